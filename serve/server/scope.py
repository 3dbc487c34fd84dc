"""Keys of an ASGI scope by which our HTTP protocol and our application know of each other."""

#: There if all of the body is.
COMPLETE = "jaxembed.complete"
#: The room that is kept for the request since its headers came.
ROOM = "jaxembed.room"
#: The task that makes an answer; the protocol takes it out, and cancels it, if the client leaves before it is made.
TASK = "jaxembed.task"

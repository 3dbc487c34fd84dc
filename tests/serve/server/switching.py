"""Which version serves."""

import asyncio

ROW = {"user": 1, "history": [2], "dense": [0.0, 0.0]}


async def version_of(client):
    answer = await client.post("/v1/models/model:predict", json={"instances": [ROW]})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["predictions"]
    assert found == {"history": 2.0, "user": found["version"] * 1000 + 1, "version": found["version"]}
    return int(found["version"])


async def until(condition):
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never happened")

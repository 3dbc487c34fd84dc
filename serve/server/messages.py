"""The messages of grpc_predict_v2.proto.

They live in a pool of their own: clients in the same process bring messages of the same names.
"""

import importlib.resources

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"


def _load() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    data = importlib.resources.files(__package__ or "").joinpath("grpc_predict_v2.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    return pool


_POOL = _load()
#: By name of the method, the classes of its request and its response.
METHODS = {
    method.name: (
        message_factory.GetMessageClass(method.input_type),
        message_factory.GetMessageClass(method.output_type),
    )
    for method in _POOL.FindServiceByName(SERVICE).methods
}

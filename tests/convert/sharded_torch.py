"""Programs that save and load sharded checkpoints with torch and TorchRec themselves, each in processes of its own."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint

SHAPES = {"films": (1001, 16), "users": (300, 8)}


def values(name, offset=0.0):
    rows, dim = SHAPES[name]
    return torch.arange(rows * dim, dtype=torch.float32).reshape(rows, dim) / 64 + offset


def states():
    """A state dict with Adam's, each tensor with the axis it is sharded over."""
    place = {"films": 0, "users": 1}
    weights = {f"net.embedding_bags.{name}.weight": (place[name], values(name)) for name in SHAPES}
    state = {
        f"net.embedding_bags.{name}.weight": {
            f"{name}.momentum1": (place[name], values(name, 0.25)),
            f"{name}.exp_avg_sq": (place[name], values(name, 0.5)),
        }
        for name in SHAPES
    }
    return {"model": weights, "optimizer": {"state": state, "epoch": 3}}


def of_tensors(make, tree):
    if isinstance(tree, dict):
        return {key: of_tensors(make, value) for key, value in tree.items()}
    return make(*tree) if isinstance(tree, tuple) else tree


def torch_save(folder):
    """Tables over rows and over columns."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = of_tensors(lambda axis, whole: distribute_tensor(whole, mesh, [Shard(axis)]), states())
    checkpoint.save(state, checkpoint_id=folder)


def torch_load(folder):
    """The other way round."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = of_tensors(
        lambda axis, whole: distribute_tensor(torch.zeros_like(whole), mesh, [Shard(1 - axis)]), states()
    )
    state["optimizer"].pop("epoch")
    checkpoint.load(state, checkpoint_id=folder)

    def check(found, expected):
        if isinstance(expected, dict):
            for key in found:
                check(found[key], expected[key])
        else:
            assert torch.equal(found.full_tensor(), expected[1])

    check(state, states())


def torchrec_model(optimizer):
    """Sharded by TorchRec, films over columns."""
    import torchrec
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints

    tables = [
        torchrec.EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"{name}_ids"]
        )
        for name, (rows, dim) in SHAPES.items()
    ]
    model = torch.nn.ModuleDict(
        {"net": torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=tables)}
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": getattr(EmbOptimType, optimizer), "learning_rate": 0.1}
    )
    constraints = {
        "films": ParameterConstraints(["column_wise"], ["fused"], min_partition=8),
        "users": ParameterConstraints(["table_wise"], ["fused"]),
    }
    plan = EmbeddingShardingPlanner(Topology(1, "cpu"), constraints=constraints).plan(model, [sharder])
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def torchrec_step(model):
    import torchrec

    bags = torchrec.KeyedJaggedTensor(
        keys=[f"{name}_ids" for name in SHAPES],
        values=torch.tensor([1, 2, 1000, 7, 3, 299]),
        lengths=torch.tensor([3, 1, 1, 1]),
    )
    found = model.module["net"](bags).wait().values()
    found.pow(2).sum().backward()
    return found.detach()


def state_of(model):
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def torchrec_save(folder, optimizer):
    """After a step, and what the second step looked up."""
    model = torchrec_model(optimizer)
    torchrec_step(model)
    checkpoint.save(state_of(model), checkpoint_id=folder)
    torchrec_step(model)
    torch.save(torchrec_step(model), f"{folder}.looked-up")


def torchrec_load(folder, optimizer, original):
    """A second step from there looks up what the original's did after it: tables and slots are those."""
    model = torchrec_model(optimizer)
    state = state_of(model)
    checkpoint.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])
    torchrec_step(model)
    assert torch.equal(torchrec_step(model), torch.load(f"{original}.looked-up", weights_only=True))


if __name__ == "__main__":
    rank, size, port, what, *arguments = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    globals()[what](*arguments)
    dist.destroy_process_group()

"""Object checkpoints of TensorFlow's TPUEmbedding and TPUEmbeddingForServing, stacked by SparseCore or not.

An embedding object tracks `_variables`: {table: {"parameters": [V, D], slot: [V, D]}}. Of SparseCore they are
by stack instead (`tensorflow_stacks.py`): read as tables, and written so where a layout is given.

References:
  `tf.tpu.experimental.embedding.TPUEmbeddingForServing`; tensorflow/core/protobuf/trackable_object_graph.proto.
"""

import errno
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import read_regular, write_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.writing import regrouped
from jaxembed.convert.arrays import refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Place, Source
from jaxembed.convert.keys import is_table, place_arrays
from jaxembed.convert.sidecar import MAX_SIDECAR, SIDECAR, read_sidecar, sidecar_of
from jaxembed.convert.tensorflow_stacks import (
    LAYOUTS,
    Layouts,
    Variable,
    layouts_in_file,
    parse_layouts,
    unstacked,
    variables_of,
)
from jaxembed.convert.tensorflow_tensors import Tensors, slice_spec

#: What takes `Options.layout`.
LAYOUT = ("write",)
PARAMETERS, VARIABLES = "parameters", "_variables"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "VARIABLE_VALUE"
NAME = "ckpt"
#: What a writer hands to TensorFlow at once.
PART_BYTES = 32 << 20


def matches(path: pathlib.Path) -> bool:
    """Whether it is the prefix of a checkpoint, or a folder with one."""
    if path.is_dir():
        return next(path.glob("*.index"), None) is not None
    return path.suffix == ".index" or pathlib.Path(f"{path}.index").is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens it; tensors are mapped and verified when the first of their rows is asked for."""
    tensors = Tensors(_prefix(path))
    by_key = {key: tensors.stored(key) for key in tensors.shapes if tensors.is_number(key)}
    places = _places(tensors)
    layouts = _layouts(tensors)
    arrays: dict[str, StoredArray] = dict(by_key)
    for stack, members in layouts.items():
        found = {key: place for key, place in places.items() if place[0] == stack}
        if not found:
            raise ValueError(f"{path} has a layout of the stack {stack!r}, but no such stack.")
        for key, (_, slot) in found.items():
            places.pop(key)
            arrays.pop(key, None)
            for member in members:
                name = f"{key}#{member.name}"
                arrays[name] = unstacked(by_key[key], member)
                places[name] = (member.name, slot)

    def guess(key: str, array: StoredArray) -> Place | None:
        # A checkpoint without such an object, of any program, may still hold tables.
        return places.get(key) if places else ((key, None) if is_table(array) else None)

    tables, slots, notes = place_arrays(path, arrays, options, guess)
    sidecar, known = tensors.prefix.parent / SIDECAR, {}
    if sidecar.exists() and tensors.prefix.name == NAME:
        known = read_sidecar(sidecar, read_regular(sidecar, MAX_SIDECAR))
    elif sidecar.exists():
        notes += (f"left out: {SIDECAR}, which is of the checkpoint {NAME!r} beside this one",)
    return Source(tables, slots, notes=notes, **known)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, that of a TPUEmbedding; of names, those that are of one variable; and that the layout fits."""
    del out
    needed("tensorflow", "tensorflow")
    refuse_types(contents, "a TPUEmbedding of TensorFlow", ("float32",))
    sidecar_of(contents)
    given = _given_layouts(contents.options.layout)
    found: dict[str, Variable] = {}
    for variable in variables_of(contents, given and given[1]):
        other = found.setdefault(_name(variable), variable)
        if other is not variable:
            raise ValueError(
                f"{_shown(other)} and {_shown(variable)} would be one variable of TensorFlow, {_name(variable)!r}; rename "
                "the table."
            )


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a folder with a checkpoint that `tf.train.Checkpoint(embedding=...)` restores, by stacks if a layout is given."""
    tf: Any = needed("tensorflow", "tensorflow")
    given = _given_layouts(contents.options.layout)
    variables = variables_of(contents, given and given[1])
    out.mkdir()
    parts: list[str] = []

    def save(names: list[str], slices: list[str], tensors: list[Any]) -> None:
        parts.append(str(out.parent / "parts" / f"part-{len(parts)}"))
        tf.raw_ops.SaveV2(prefix=parts[-1], tensor_names=names, shape_and_slices=slices, tensors=tensors)

    try:
        with tf.device("/cpu:0"):
            for i, variable in enumerate(variables):
                key, dtype = _key(_name(variable)), variable.streams[0].dtype
                row_bytes = max(math.prod(variable.shape[1:]) * dtype.itemsize, 1)
                blocks = variable.blocks(out.parent / f"stack-{i}")
                for start, rows in regrouped(blocks, max(PART_BYTES // row_bytes, 1)):
                    save([key], [slice_spec(variable.shape, start, rows.shape[0])], [tf.constant(rows)])
            counter = f"save_counter/.ATTRIBUTES/{VALUE}"
            names, values = [counter], [tf.constant(1, tf.int64)]
            if given is not None:
                names, values = [*names, _key(LAYOUTS)], [*values, tf.constant(given[0])]
            graph = tf.constant(_graph(variables, given is not None, counter))
            save([GRAPH, *names], [""] * (1 + len(names)), [graph, *values])
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts, destination_prefix=str(out / NAME), delete_old_dirs=False
            )
    except tf.errors.OpError as e:
        number = errno.ENOSPC if isinstance(e, tf.errors.ResourceExhaustedError) else errno.EIO
        raise OSError(number, f"TensorFlow cannot write it: {str(e)[:300]}", str(out)) from e
    state = f'model_checkpoint_path: "{NAME}"\nall_model_checkpoint_paths: "{NAME}"\n'
    write_file(out / "checkpoint", [state.encode()])
    write_file(out / SIDECAR, [sidecar_of(contents)])
    stacks = [f"table {m.name!r} -> stack {v.owner!r}" for v in variables if not v.slot for m in v.members]
    return [*stacks, f"restore it with tf.train.Checkpoint(embedding=...).restore({NAME!r} in that folder)"]


def _prefix(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        return path.with_suffix("") if path.suffix == ".index" else path
    names = sorted(p.name.removesuffix(".index") for p in path.glob("*.index"))
    if len(names) == 1:
        return path / names[0]
    if not names:
        raise FileNotFoundError(f"no checkpoint of TensorFlow at {path}: no *.index file is in it.")
    tf: Any = needed("tensorflow", "tensorflow")
    latest = pathlib.Path(tf.train.latest_checkpoint(str(path)) or "")
    if latest.name in names and latest.parent == path:
        return latest
    raise ValueError(f"{path} has the checkpoints {names}; name one of them, such as {path / names[-1]}.")


def _places(tensors: Tensors) -> dict[str, Place]:
    """The table, or stack, and slot of each key, by the graph of objects."""
    if GRAPH not in tensors.shapes:
        return {}
    from tensorflow.core.protobuf import trackable_object_graph_pb2  # type: ignore[import-not-found]

    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    try:
        graph.ParseFromString(tensors.string(GRAPH))
    except Exception as e:  # protobuf's DecodeError is of no common type
        raise CheckpointError(f"{tensors.prefix}: {GRAPH} is damaged: {str(e)[:200]}") from e
    nodes = graph.nodes
    places: dict[str, Place] = {}

    def children(node: Any) -> Iterator[tuple[str, Any]]:
        for child in node.children:
            if not 0 <= child.node_id < len(nodes):
                raise CheckpointError(f"{tensors.prefix}: its graph of objects is damaged.")
            yield child.local_name, nodes[child.node_id]

    for node in nodes:
        for name, variables in children(node):
            if name == VARIABLES:
                for table, of_table in children(variables):
                    for slot, variable in children(of_table):
                        for value in variable.attributes:
                            if value.name == VALUE and value.checkpoint_key in tensors.shapes:
                                places[value.checkpoint_key] = (table, None if slot == PARAMETERS else slot)
    return places


def _layouts(tensors: Tensors) -> Layouts:
    """The tables of each stack of SparseCore."""
    return {
        stack: tables
        for key in tensors.shapes
        if LAYOUTS in key
        for stack, tables in parse_layouts(f"{tensors.prefix}: {key}", tensors.string(key)).items()
    }


def _given_layouts(path: pathlib.Path | None) -> tuple[bytes, Layouts] | None:
    """The layouts to write stacks by: a file's, or those in a checkpoint."""
    if path is None:
        return None
    if not matches(path):
        return layouts_in_file(path)
    tensors = Tensors(_prefix(path))
    for key in tensors.shapes:
        if LAYOUTS in key and (layouts := parse_layouts(f"{tensors.prefix}: {key}", tensors.string(key))):
            return tensors.string(key), layouts
    raise ValueError(
        f"{path} has no layout of stacks to take; it is a checkpoint whose tables are unstacked. Leave layout out."
    )


def _name(variable: Variable) -> str:
    return variable.owner if variable.slot is None else f"{variable.owner}/{variable.slot}"


def _shown(variable: Variable) -> str:
    slot = "" if variable.slot is None else f"slot {variable.slot!r} of "
    return f"{slot}{'stack' if variable.members else 'table'} {variable.owner!r}"


def _key(name: str) -> str:
    return f"embedding/{name.replace('.', '..').replace('/', '.S')}/.ATTRIBUTES/{VALUE}"


def _graph(variables: Sequence[Variable], has_layouts: bool, counter: str) -> bytes:
    """What TensorFlow stores about a Checkpoint(embedding=...): TPUEmbeddingForServing, or with layouts TPUEmbeddingV2."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2  # type: ignore[import-not-found]

    graph = trackable_object_graph_pb2.TrackableObjectGraph()

    def node(children: Mapping[str, int], key: str = "", name: str = "") -> int:
        made = graph.nodes.add()
        for child, i in children.items():
            made.children.add(node_id=i, local_name=child)
        if key:
            made.attributes.add(name=VALUE, full_name=name, checkpoint_key=key)
        made.has_checkpoint_values.value = bool(key or children)
        return len(graph.nodes) - 1

    # The root must come first: its children are added once they have numbers.
    node({})
    owners: dict[str, dict[str, int]] = {}
    embedding: dict[str, int] = {}
    for variable in variables:
        name = _name(variable)
        embedding[name] = node({}, _key(name), name)
        owners.setdefault(variable.owner, {})[variable.slot or PARAMETERS] = embedding[name]
    if has_layouts:
        embedding[LAYOUTS] = node({}, _key(LAYOUTS), LAYOUTS)
    embedding[VARIABLES] = node({owner: node(children) for owner, children in owners.items()})
    for child, i in {"embedding": node(embedding), "save_counter": node({}, counter, "save_counter")}.items():
        graph.nodes[0].children.add(node_id=i, local_name=child)
    graph.nodes[0].has_checkpoint_values.value = True
    return graph.SerializeToString()

"""Pickles are data: whatever they say, nothing is imported or called, and every end is a value or a PickleError."""

import io
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from ckpt_tools import CheckpointError, check_distributed_metadata, convert, open_checkpoint
from ckpt_tools.storage.torch_pickle import TensorRef, loads
from ckpt_tools.storage.unpickle import PickleError, Record, walk
from models import hf_state, rank_file, small, write_hf

ALARMS = ("import", "os.system", "subprocess.Popen", "exec", "compile", "pickle.find_class", "open")
heard = []
listening = False
sys.addaudithook(lambda event, _: heard.append(event) if listening and event in ALARMS else None)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


def tensor(offset, shape, stride, storage=None):
    return V2 + b"(" + (storage or PID) + offset + shape + stride + HOOKS + b"tR"


class Reduce:
    def __reduce__(self):
        return os.system, ("touch hostile-ran",)


RUN = text("touch hostile-ran")
SYSTEM = name("os", "system") + RUN + b"\x85R"
PID = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
V2 = name("torch._utils", "_rebuild_tensor_v2")
FROM_TYPE = name("torch._tensor", "_rebuild_from_type_v2")
HOOKS = b"\x89" + name("collections", "OrderedDict") + b")R"
NAMESPACE = name("argparse", "Namespace") + b")R"
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 61)

INERT = {
    "REDUCE": pickle.dumps(Reduce()),
    "REDUCE, protocol 0": pickle.dumps(Reduce(), 0),
    "INST": b"(S'touch hostile-ran'\nios\nsystem\n.",
    "OBJ": b"(" + name("os", "system") + RUN + b"o.",
    "NEWOBJ": name("os", "system") + RUN + b"\x85\x81.",
    "NEWOBJ_EX": name("os", "system") + RUN + b"\x85}\x92.",
    "__setstate__ set to a function": NAMESPACE
    + b"}"
    + text("__setstate__")
    + name("os", "system")
    + b"sb"
    + RUN
    + b"b.",
    "dotted name": text("builtins") + text("getattr.__class__.__mro__") + b"\x93.",
    "eval": name("builtins", "eval") + RUN + b"\x85R.",
    "torch.load": name("torch", "load") + RUN + b"\x85R.",
    "pydoc.locate": name("pydoc", "locate") + text("os.system") + b"\x85R.",
    "a call inside a key": b"}" + SYSTEM + b"K\x01s.",
    "hooks of a tensor": V2 + b"(" + PID + b"K\x00K\x04\x85K\x01\x85\x89" + SYSTEM + b"tR.",
    "frame of 2^62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "a list that contains itself": b"]q\x00h\x00a.",
}
REFUSED = {
    "BUILD on a function": V2 + b"N}" + text("__defaults__") + b")s\x86b.",
    "getattr of __import__": name("builtins", "getattr") + name("builtins", "__import__") + text("os") + b"\x85R"
    + text("system") + b"\x86R" + RUN + b"\x85R.",
    "a global named by numbers": b"K\x01K\x02\x93.",
    "a call of a call": SYSTEM + b")R.",
    "rebuild from a call": V2 + b"(" + SYSTEM + b"K\x00))" + HOOKS + b"tR.",
    "negative size": tensor(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85") + b".",
    "beyond the storage": tensor(b"K\x02", b"K\x04\x85", b"K\x01\x85") + b".",
    "2^61 elements of stride 0": tensor(b"K\x00", HUGE + b"\x85", b"K\x00\x85") + b".",
    "more elements than the storage": tensor(b"K\x00", b"K\x03K\x03\x86", b"K\x01K\x00\x86") + b".",
    "a size that is a bool": tensor(b"K\x00", b"\x88\x85", b"K\x01\x85") + b".",
    "too few arguments": V2 + b"(" + PID + b"tR.",
    "subclass by an unknown function": FROM_TYPE + b"(" + name("os", "system") + b"N" + RUN + b"\x85NtR.",
    "subclass of itself": FROM_TYPE + b"(" + FROM_TYPE + b"N)NtR.",
    "storage key that is a path": PID.replace(text("0"), text("../../etc/passwd")) + b".",
    "storage of an unknown type": PID.replace(b"ctorch\nFloatStorage", b"cos\nsystem") + b".",
    "textual persistent id": b"Pstorage\n.",
    "other persistent id": text("module") + b"Q.",
    "rot13": name("_codecs", "encode") + text("x") + text("rot13") + b"\x86R.",
    "extension code": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "tuples as an exponential key": b"})" + b"2\x86" * 60 + b"Ns.",
    "2^62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "negative length": b"\x8b\xff\xff\xff\xff.",
    "a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "list as a key": b"}]K\x01s.",
    "dictionary in a set": b"\x8f(}\x90.",
    "mark as a value": b"(q\x00.",
    "empty stack": b"0.",
    "APPENDS without a mark": b"]e.",
    "memo never put": b"h\x05.",
    "half a name": b"cos\n\n",
    "a mark inside a tuple": b"(\x85.",
    "unknown operation": b"\xff.",
    "empty": b"",
    "truncated": SYSTEM[:-3],
}  # fmt: skip
NESTED = {
    "a million nested tuples": b")" + b"\x85" * 1_000_000 + b".",
    "a million nested lists": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "doubling tuples": b")" + b"2\x86" * 60 + b".",
    "memo index 2^32 - 1": b"Nr\xff\xff\xff\xff.",
}


def quietly(call, *args):
    """The result of a call during which nothing may be imported, opened or run, within a few seconds."""
    global listening
    heard.clear()
    started, listening = time.process_time(), True
    try:
        return call(*args)
    finally:
        listening = False
        assert heard == []
        assert time.process_time() - started < 10


@pytest.mark.parametrize("title", INERT)
def test_hostile_values_are_inert(title):
    loads(INERT[title])  # text codecs of old protocols are loaded once
    quietly(loads, INERT[title])


@pytest.mark.parametrize("title", REFUSED)
def test_hostile_pickles_are_refused(title):
    with pytest.raises(PickleError):
        quietly(loads, REFUSED[title])


@pytest.mark.parametrize("title", NESTED)
def test_bombs_are_bounded(title):
    def read():
        try:
            return sum(1 for _ in walk(loads(NESTED[title]), TensorRef, 200_000))
        except PickleError:
            return 0

    assert quietly(read) == 0


def test_a_real_tree_is_read():
    tree = {
        "w": torch.randn(3, 4, dtype=torch.bfloat16),
        "p": torch.nn.Parameter(torch.ones(2)),
        "kind": pytest.ExitCode.OK,
    }

    stream = io.BytesIO()
    torch.save(tree, stream)
    with zipfile.ZipFile(stream) as archive:
        read = quietly(loads, archive.read("archive/data.pkl"))
    assert {path[0]: (t.dtype, t.shape) for path, t in walk(read, TensorRef)} == {
        "w": ("bfloat16", (3, 4)),
        "p": ("float32", (2,)),
    }
    assert type(read["kind"]) is Record


@pytest.mark.parametrize("kind", ["bin", "rank", "deepspeed", "metadata", "distcp", "common"])
def test_every_pickled_file_is_read_as_data(kind, tmp_path):
    """A hostile pickle in each kind of file: opening the folder fails in one line, and runs nothing."""
    folder = tmp_path / "model"
    write_hf(folder, small(), hf_state(small()))
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        _hostile_zip(folder / "pytorch_model.bin")
    elif kind == "rank":
        rank_file(folder, 0, 0, 1).parent.mkdir()
        _hostile_zip(rank_file(folder, 0, 0, 1))
    elif kind == "deepspeed":
        _hostile_zip(folder / "mp_rank_00_model_states.pt")
    else:
        _hostile_distributed(folder, kind)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not (tmp_path / "hostile-ran").exists()
    assert not os.path.exists("hostile-ran")


def _hostile_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Reduce()))


def _hostile_distributed(folder, kind):
    (folder / "metadata.json").write_text("{}")
    item = folder / "__0_0.distcp"
    _hostile_zip(item)
    _hostile_zip(folder / "common.pt")
    if kind != "distcp":
        (folder / ".metadata").write_bytes(pickle.dumps(Reduce()))
    else:
        from torch.distributed.checkpoint import metadata as m
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        key, size = "embedding.word_embeddings.weight", torch.Size([2, 2])
        offsets = torch.Size([0, 0])
        tensor = m.TensorStorageMetadata(
            m.TensorProperties(dtype=torch.float32), size, [m.ChunkStorageMetadata(offsets, size)]
        )
        place = {m.MetadataIndex(key, offsets): _StorageInfo("__0_0.distcp", 0, item.stat().st_size)}
        (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata({key: tensor}, storage_data=place)))


def test_args_that_are_code_are_inert(model, tmp_path):
    """Attributes of the Namespace that the model does not need stay placeholders."""
    convert(model, tmp_path / "m", to="megatron-core")
    file = rank_file(tmp_path / "m/iter_0000001", 0, 0, 1)
    tree = torch.load(file, weights_only=False)
    tree["args"].hook = Reduce()
    tree["optimizer"] = Reduce()
    torch.save(tree, file)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.read("output_layer.weight")
    assert not os.path.exists("hostile-ran")


def save_with_torch(folder):
    from torch.distributed.checkpoint import save

    folder.mkdir()
    state = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "steps": torch.tensor(3), "note": b"x"}
    save(state, checkpoint_id=folder)
    return folder / ".metadata"


def test_the_metadata_of_a_real_distributed_checkpoint_passes(tmp_path):
    save_with_torch(tmp_path / "real")
    check_distributed_metadata(tmp_path / "real")


@pytest.mark.parametrize("hidden", ["popped", "in the data", "under another name", "truncated", "missing"])
def test_metadata_that_torch_would_run_is_not_opened(tmp_path, hidden):
    file = save_with_torch(tmp_path / "hostile")
    content = file.read_bytes()
    changed = {
        "popped": b"\x80\x04" + SYSTEM + b"0" + content[2:],
        "in the data": pickle.dumps({"state_dict_metadata": Reduce()}),
        "under another name": text("torch") + text("load") + b"\x93.",
        "truncated": content[:-20],
    }
    file.unlink() if hidden == "missing" else file.write_bytes(changed[hidden])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        check_distributed_metadata(tmp_path / "hostile")
    assert not Path("hostile-ran").exists()

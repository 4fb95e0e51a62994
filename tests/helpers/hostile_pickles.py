"""Pickles that are broken or mean harm, and what is said of each when it is refused."""

import io
import pickle
import struct

import torch

from tests.helpers.edm_pickles import Call, assemble, dumps, module, name, text

# Globals, `module:name`, that would run something or help to, with the arguments of a call.
CALLS = {
    "os:system": ("touch {canary}",),
    "posix:system": ("touch {canary}",),
    "subprocess:check_call": (["touch", "{canary}"],),
    "subprocess:Popen": (["touch", "{canary}"],),
    "builtins:eval": ("open('{canary}', 'w')",),
    "builtins:exec": ("open('{canary}', 'w')",),
    "builtins:open": ("{canary}", "w"),
    "builtins:getattr": ([], "append"),
    "builtins:__import__": ("os",),
    "pathlib:Path": ("{canary}",),
    "runpy:run_path": ("{canary}",),
    "pickle:loads": (b"cposix\nsystem\n(S'touch {canary}'\ntR.",),
    "torch:load": ("{canary}",),
    "torch.hub:load": ("{canary}", "model"),
    "torch.serialization:load": ("{canary}",),
    "torch._utils:_import_dotted_name": ("os.system",),
    "torch._utils:_rebuild_tensor": (),
    "torch._utils:_rebuild_wrapper_subclass": (),
    "torch.storage:UntypedStorage": (10**10,),
    "torch:empty": (10**10,),
    "numpy:empty": (10**10,),
    "numpy.core.multiarray:_reconstruct": (),
    "functools:partial": (),
    "functools:reduce": (),
    "operator:attrgetter": ("system",),
    "operator:methodcaller": ("system",),
    "copyreg:_reconstructor": (),
    "collections:deque": (),
    "_codecs:encode": ("text", "latin1"),
    "torch_utils.persistence:import_hook": (),
    "dnnlib.util:get_obj_by_name": ("os.system",),
    # Of a dotted name Python's unpickler would look up the attributes.
    "collections:OrderedDict.fromkeys": ("ab",),
    "torch_utils.persistence:_reconstruct_persistent_obj.__globals__": (),
    "torch._utils:_rebuild_parameter.__globals__": (),
}


def storage_bytes(tensor=None):
    """A storage as torch pickles it: 16 bytes for four elements, unless the tensor is another."""
    tensor = torch.zeros(4) if tensor is None else tensor
    typed_storage = tensor.__reduce_ex__(4)[1][0]
    return typed_storage.__reduce__()[1][0]


def storage(content):
    return Call("torch.storage", "_load_from_bytes", content)


def tensor(content=None, offset=0, size=(2, 2), stride=(2, 1)):
    content = storage_bytes() if content is None else content
    return Call("torch._utils", "_rebuild_tensor_v2", storage(content), offset, size, stride, False, {})


def with_tensor(content=None, **options):
    return dumps({"ema": module("EDMPrecond", {"weight": tensor(content, **options)}, _init_kwargs={})})


def changed(*replacements):
    """The file with one storage, in whose bytes each old part is replaced by a new one."""
    content = storage_bytes()
    for old, new in replacements:
        assert content.count(old) == 1
        content = content.replace(old, new)
    return with_tensor(content)


def with_module(*modules, **attributes):
    tree = dict(zip("abcdefghijkl", modules, strict=False))
    return dumps({"ema": module("EDMPrecond", modules=tree, _init_kwargs={}, **attributes)})


def nested(depth):
    return module("Layer", modules={"a": nested(depth - 1)} if depth else {})


def payload(command):
    return pickle.PROTO + b"\x02cposix\nsystem\n" + text(command) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def cyclic_module():
    """A module that is its own child: its state goes into the memo, and into itself."""
    put, get = pickle.BINPUT + b"\x05", pickle.BINGET + b"\x05"
    module_dict = name("torch.nn.modules.container", "ModuleDict") + pickle.EMPTY_TUPLE + pickle.NEWOBJ + put
    tables = text("_parameters") + pickle.EMPTY_DICT + text("_buffers") + pickle.EMPTY_DICT
    children = text("_modules") + pickle.EMPTY_DICT + text("a") + get + pickle.SETITEM
    state = pickle.EMPTY_DICT + pickle.MARK + tables + children + pickle.SETITEMS
    return persistent(text("_modules") + pickle.EMPTY_DICT + text("a") + module_dict + state + pickle.BUILD
                      + pickle.SETITEM + tables + text("_init_kwargs") + pickle.EMPTY_DICT)  # fmt: skip


def persistent(items):
    meta = text("class_name") + text("EDMPrecond") + text("state") + pickle.EMPTY_DICT + pickle.MARK + items
    meta = pickle.EMPTY_DICT + pickle.MARK + meta + pickle.SETITEMS + pickle.SETITEMS
    return assemble(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta, pickle.TUPLE1, pickle.REDUCE)


def zip_bytes():
    file = io.BytesIO()
    torch.save(torch.zeros(4), file)
    return file.getvalue()


ORDERED_DICT = name("collections", "OrderedDict")
MODULE_DICT = name("torch.nn.modules.container", "ModuleDict") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
LOAD = name("torch.storage", "_load_from_bytes")
BIG = 10 * 2**30
BIG_OPCODE = pickle.LONG1 + b"\x05" + BIG.to_bytes(5, "little")

# What the file holds, and what the error says of it.
REFUSED = {
    "empty": (lambda: b"", "a file that is no pickle"),
    "text": (lambda: b"these are no weights", "a file that is no pickle"),
    "zip": (lambda: b"PK\x03\x04" + bytes(100), "a file that is no pickle"),
    "protocol byte alone": (lambda: b"\x80", "a broken pickle: not enough data"),
    "a number": (lambda: dumps(1), "1 in its place"),
    "some list": (lambda: dumps([1]), "some list in its place"),
    "a state dict": (lambda: dumps({"a": torch.zeros(1)}), 'a dictionary without "ema"'),
    "ema is none": (lambda: dumps({"ema": None}), "None in its place"),
    "another class": (lambda: dumps({"ema": module("VPPrecond")}), "a VPPrecond, not an EDMPrecond"),
    "class with lines": (lambda: dumps({"ema": module("A\nB")}), "an object of EDM's without its class and state"),
    "long class": (lambda: dumps({"ema": module("A" * 101)}), "an object of EDM's without its class and state"),
    "no arguments": (lambda: dumps({"ema": module("EDMPrecond")}), "a network without the arguments"),
    "unnamed arguments": (
        lambda: dumps({"ema": module("EDMPrecond", _init_kwargs={}, _init_args=(32, 3))}), "a network whose constructor"
    ),
    "state is a list": (
        lambda: dumps(Call("torch_utils.persistence", "_reconstruct_persistent_obj", {"state": []})),
        "an object of EDM's without",
    ),
    # Modules.
    "deep modules": (lambda: with_module(nested(8)), "the module a.a.a.a.a.a.a.a in two places, or in more than 8"),
    "shared module": (lambda: (lambda m: with_module(m, m))(module("Layer")), "the module b in two places"),
    "module in itself": (cyclic_module, "the module a.a in two places"),
    "number as a module": (lambda: with_module(3), "3 as the member a"),
    "tensor as a module": (lambda: with_module(torch.zeros(1)), "some Tensor as the member a"),
    "module as a tensor": (
        lambda: dumps({"ema": module("EDMPrecond", {"a": module("Layer")}, _init_kwargs={})}),
        "some Inert as the member a",
    ),
    "dotted name": (lambda: with_module(module("Layer", {"a.b": torch.zeros(1)})), "the name 'a.b' in _parameters"),
    "long name": (lambda: with_module(module("Layer", {"a" * 101: torch.zeros(1)})), "the name 'aaaaaaaaa"),
    "name with a line": (lambda: with_module(module("Layer", {"a\nb": torch.zeros(1)})), r"the name 'a\nb' in"),
    "module without tables": (
        lambda: with_module(Call("torch.nn.modules.container", "ModuleDict")), "a ModuleDict without a state"
    ),
    "same name twice": (
        lambda: with_module(module("Layer", {"a": torch.zeros(1)}, {"a": torch.zeros(1)})),
        "some Tensor as the member a.a",
    ),
    # Tensors.
    "10 GB shape": (lambda: with_tensor(size=(BIG,), stride=(0,)), "a tensor that reaches beyond its storage"),
    "10 GB product": (lambda: with_tensor(size=(4,) * 8, stride=(0,) * 8), "a tensor that reaches beyond its storage"),
    "many dimensions": (lambda: with_tensor(size=(1,) * 9, stride=(0,) * 9), "a tensor of a size and stride"),
    "huge numbers": (lambda: with_tensor(size=(2**400, 1), stride=(1, 1)), "a tensor that reaches beyond its storage"),
    "offset": (lambda: with_tensor(offset=1), "a tensor that reaches beyond its storage"),
    "huge offset": (lambda: with_tensor(offset=2**62), "a tensor that reaches beyond its storage"),
    "negative offset": (lambda: with_tensor(offset=-1), "a tensor that reaches beyond its storage"),
    "stride": (lambda: with_tensor(stride=(3, 1)), "a tensor that reaches beyond its storage"),
    "negative stride": (lambda: with_tensor(offset=3, stride=(-2, -1)), "a tensor that reaches beyond its storage"),
    "huge stride": (lambda: with_tensor(size=(1,), stride=(2**62,)), "a tensor that reaches beyond its storage"),
    "negative size": (lambda: with_tensor(size=(-2, -2)), "a tensor that reaches beyond its storage"),
    "no elements": (lambda: with_tensor(size=(0, 2)), "a tensor that reaches beyond its storage"),
    "text as a size": (lambda: with_tensor(size=("a", 2)), "a tensor of a size and stride that do not fit"),
    "True as a size": (lambda: with_tensor(size=(True, 2)), "a tensor of a size and stride that do not fit"),
    "size without stride": (lambda: with_tensor(stride=(1,)), "a tensor of a size and stride that do not fit"),
    "no storage": (
        lambda: dumps(Call("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,), False, {})), "a tensor without its"
    ),
    "no tensor": (lambda: dumps(Call("torch._utils", "_rebuild_parameter", 1, False, {})), "a parameter without its"),
    "views of one storage": (
        lambda: dumps([Call("torch._utils", "_rebuild_tensor_v2", s, 0, (1000,), (1,), False, {})
                       for s in [storage(storage_bytes(torch.zeros(1000)))] for _ in range(99)]),
        "tensors of more bytes than the file",
    ),
    "one storage read often": (
        lambda: assemble(
            pickle.BINBYTES, struct.pack("<I", len(storage_bytes(torch.zeros(1000)))), storage_bytes(torch.zeros(1000)),
            pickle.BINPUT, b"\x00", (LOAD + pickle.BINGET + b"\x00" + pickle.TUPLE1 + pickle.REDUCE) * 100,
        ),
        "storages of more bytes than the file",
    ),
    # Storages.
    "10 GB storage": (lambda: changed((b"K\x04N", BIG_OPCODE + b"N")), "a storage of 16 bytes, which do not fit its"),
    "10 GB storage and count": (
        lambda: changed((b"K\x04N", BIG_OPCODE + b"N"), (b"\x04" + bytes(7), struct.pack("<Q", BIG))),
        "a storage of 16 bytes, which do not fit its 10737418240",
    ),
    "negative count": (
        lambda: changed((b"K\x04N", b"J\xff\xff\xff\xffN"), (b"\x04" + bytes(7), b"\xff" * 8)),
        "a storage of 16 bytes, which do not fit its -1",
    ),
    "short storage": (lambda: with_tensor(storage_bytes()[:-1]), "a storage of 15 bytes, which do not fit its 4"),
    "long storage": (lambda: with_tensor(storage_bytes() + b"a"), "a storage of 17 bytes, which do not fit its 4"),
    "no bytes": (lambda: with_tensor(b""), "a broken pickle"),
    "storage of longs": (
        lambda: changed((b"FloatStorage", b"LongStorage")), "the global torch.LongStorage, which is refused"
    ),
    "storage of torch.load": (
        lambda: changed((b"ctorch\nFloatStorage", b"ctorch\nload")), "the global torch.load, which is refused"
    ),
    "payload for a storage": (
        lambda: with_tensor(payload("touch canary")), "the global posix.system, which is refused"
    ),
    "payload after the header": (
        lambda: with_tensor(storage_bytes()[:15] + payload("touch canary")), "the global posix.system, which is refused"
    ),
    "payload as the storage": (
        lambda: changed((b"ctorch\nFloatStorage\n", payload("touch canary")[2:-1])),
        "the global posix.system, which is refused",
    ),
    "payload as the keys": (
        lambda: with_tensor((lambda c: c[: c.rindex(b"\x80\x02]")] + payload("touch canary"))(storage_bytes())),
        "the global posix.system, which is refused",
    ),
    "zip in a storage": (lambda: with_tensor(zip_bytes()), "a broken pickle: 'ascii' codec"),
    "other magic number": (lambda: with_tensor(dumps(1) * 9), "a storage in another format"),
    "big-endian": (
        lambda: changed((b"little_endianq\x02\x88", b"little_endianq\x02\x89")), "a storage that is not little-endian"
    ),
    "storage of many operations": (lambda: with_tensor(b"\x80\x02" + b"N" * 2000 + b"."), "a pickle of more than 1000"),
    # Calls in another way than a pickler's.
    "call of text": (lambda: assemble(text("a"), b")R"), "a pickle that fills or calls 'a'"),
    "call of a call": (lambda: assemble(MODULE_DICT, b")R"), "a pickle that fills or calls some Inert"),
    "call of a dictionary": (lambda: assemble(ORDERED_DICT, b")R)R"), "a pickle that fills or calls some dict"),
    "call without a tuple": (lambda: assemble(ORDERED_DICT, b"]R"), "a pickle that calls collections.OrderedDict in"),
    "state for a global": (
        lambda: assemble(LOAD, b"N}", text("__defaults__"), b")s\x86b"), "a pickle that fills or calls some Global"
    ),
    "state for a dictionary": (lambda: assemble(b"}}", text("a"), b"Nsb"), "a pickle that fills or calls some dict"),
    "state for a tensor": (
        lambda: dumps(tensor())[:-1] + b"}" + text("data") + b"Nsb.", "a pickle that fills or calls some Tensor"
    ),
    "state twice": (lambda: assemble(MODULE_DICT, b"}b}b"), "a pickle that gives a state to a ModuleDict twice"),
    "items for an object": (lambda: assemble(MODULE_DICT, text("a"), b"Ns"), "a pickle that fills or calls some Inert"),
    "items for a global": (lambda: assemble(LOAD, text("a"), b"Ns"), "a pickle that fills or calls some Global"),
    "items of a list": (lambda: assemble(b"]", text("a"), b"Ns"), "a pickle that fills or calls some list"),
    "append to a tuple": (lambda: assemble(b")Na"), "a pickle that fills or calls some tuple"),
    "append to a dictionary": (lambda: assemble(b"}(NNe"), "a pickle that fills or calls some dict"),
    "odd items": (lambda: assemble(b"}(", text("a"), b"u"), "a broken pickle: a key without a value"),
    "number as a key": (lambda: assemble(b"}NNs"), "a dictionary whose keys are not strings but None"),
    "deep tuple as a key": (
        lambda: assemble(b"})", b"\x85" * 200_000, b"Ns"), "a dictionary whose keys are not strings but some tuple"
    ),
    "dictionary of items": (lambda: assemble(ORDERED_DICT, b"]\x85R"), "a dictionary made in an unexpected way"),
    "global without a name": (lambda: assemble(b"NN\x93"), "a broken pickle: a global without a name"),
    "global with a line": (
        lambda: assemble(name("os", "a\nb\x1b")), r"the global 'os.a\nb\x1b', which is refused"
    ),
    "long global": (lambda: assemble(name("os", "a" * 10**6)), "the global os.aaa"),
    # Operations that no network needs.
    "INST": (lambda: assemble(b"(iposix\nsystem\n"), "a pickle with the operation INST, which is refused"),
    "OBJ": (lambda: assemble(b"(", LOAD, b"o"), "a pickle with the operation OBJ, which is refused"),
    "EXT1": (lambda: assemble(b"\x82\x01"), "a pickle with the operation EXT1, which is refused"),
    "EXT4": (lambda: assemble(b"\x84\x01\x00\x00\x00"), "a pickle with the operation EXT4, which is refused"),
    "NEWOBJ_EX": (lambda: assemble(LOAD, b")}\x92"), "a pickle with the operation NEWOBJ_EX, which is refused"),
    "PERSID": (lambda: assemble(b"Pa\n"), "a pickle with the operation PERSID, which is refused"),
    "BINPERSID": (lambda: assemble(text("a"), b"Q"), "a pickle that points out of itself"),
    "BYTEARRAY8": (lambda: assemble(b"\x96", bytes(8)), "a pickle with the operation BYTEARRAY8, which is refused"),
    "NEXT_BUFFER": (lambda: assemble(b"\x97"), "a pickle with the operation NEXT_BUFFER, which is refused"),
    "DUP": (lambda: assemble(b"N2"), "a pickle with the operation DUP, which is refused"),
    # Numbers that lie, and too much.
    "BINBYTES8 of 10 GB": (lambda: assemble(b"\x8e", struct.pack("<Q", BIG), b"abc"), "a broken pickle: expected"),
    "BINBYTES8 of 2^63": (lambda: assemble(b"\x8e", struct.pack("<Q", 2**63)), "a broken pickle: bytes8 byte count"),
    "BINBYTES of 4 GB": (lambda: assemble(b"B\xff\xff\xff\xff"), "a broken pickle: expected 4294967295 bytes"),
    "BINUNICODE8 of 10 GB": (lambda: assemble(b"\x8d", struct.pack("<Q", BIG)), "a broken pickle: expected"),
    "BYTEARRAY8 of 10 GB": (lambda: assemble(b"\x96", struct.pack("<Q", BIG)), "a broken pickle: expected"),
    "LONG4 of 2 GB": (lambda: assemble(b"\x8b\xff\xff\xff\x7f"), "a broken pickle: not enough data"),
    "memo of 4 billion": (lambda: assemble(b"Nr\xff\xff\xff\xff"), "None in its place"),
    "frame of 10 GB": (lambda: assemble(b"\x95", struct.pack("<Q", BIG), b"N"), "None in its place"),
    "many operations": (lambda: assemble(b"}" * 1_000_001), "a pickle of more than 1000000 operations"),
    "deep list": (lambda: assemble(b"]", b"\x85" * 200_000), "some tuple in its place"),
    "no text": (lambda: assemble(b"X\x01\x00\x00\x00\xff"), "a broken pickle: 'utf-8' codec"),
    "nothing to pop": (lambda: assemble(b"R"), "a broken pickle: nothing on its stack"),
    "nothing at all": (lambda: assemble(), "a broken pickle: nothing on its stack"),
    "beyond the mark": (lambda: assemble(b"N(s"), "a broken pickle: nothing on its stack"),
    "no mark": (lambda: assemble(b"Nt"), "a broken pickle: no mark"),
    "no memo": (lambda: assemble(b"h\x07"), "a broken pickle: nothing in its memo"),
    "unknown operation": (lambda: assemble(b"\xff"), "a broken pickle: at position"),
    "no end": (lambda: assemble(b"N")[:-1], "a broken pickle: pickle exhausted"),
}  # fmt: skip

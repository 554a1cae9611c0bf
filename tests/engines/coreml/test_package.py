"""Packages that are damaged, or none at all: a package is read right or refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from onelaunch.errors import BadInput

pytest.importorskip("coremltools")

from coremltools.converters.mil import Builder as mb

from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml import package as package_module
from onelaunch.engines.coreml.describe import describe, lines
from onelaunch.engines.coreml.package import Package, Stored, Type, is_package
from tests.engines.coreml.tiny import (
    built,
    edited,
    model_file,
    noise,
    read,
    state,
    value,
    weight_file,
)

coremltools("a test")

TABLE = noise(1, 32, 1, 32)


def _body(x):
    """Constants of every sort: in the file, in place, numbers, texts, none at all."""
    x = mb.add(x=x, y=mb.const(val=TABLE, name="table"))
    x = mb.slice_by_size(x=x, begin=[0, 8, 0, 0], size=[1, 16, 1, 32])
    x = mb.conv(x=x, weight=mb.const(val=noise(8, 16, 1, 1), name="weight"), pad_type="valid")
    x = mb.cast(x=mb.cast(x=x, dtype="fp32"), dtype="fp16")
    return mb.concat(values=[x, mb.mul(x=x, y=np.float16(0.5))], axis=1, name="y")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return built(tmp_path_factory.mktemp("whole"), _body, value(1, 32, 1, 32))


@pytest.fixture
def path(whole, tmp_path):
    """A copy of one's own."""
    return Path(shutil.copytree(whole, tmp_path / "copy.mlpackage"))


def used(path):
    """All that is done with a package."""
    package = Package(path)
    for _ in lines(describe(package)):
        pass
    for function in package.functions.values():
        for constant in function.constants.values():
            found = package.value(constant)
            if isinstance(constant, Stored):
                assert (str(found.dtype), found.shape) == (constant.type.dtype, constant.type.shape)
                assert found.nbytes <= weight_file(path).stat().st_size
                np.array(found)
    return package


def test_what_was_saved_is_read(path):
    package = used(path)
    function = package.main
    assert (package.version, list(package.functions)) == (9, ["main"])
    assert function.inputs == {"x": Type("float16", (1, 32, 1, 32))}
    assert function.outputs == ("y",)
    assert function.types["y"] == Type("float16", (1, 16, 1, 32))
    kinds = [operation.kind for operation in function.operations]
    assert kinds == ["add", "slice_by_size", "conv", "cast", "cast", "mul", "concat"]
    assert np.array_equal(package.value(function.constants["table"]), TABLE)
    assert np.array_equal(package.value(function.constants["weight"]), noise(8, 16, 1, 1))
    by_parameter = {
        parameter: package.value(function.constants[name])
        for parameter, (name, *_) in function.operations[1].inputs.items()
        if name in function.constants
    }
    assert by_parameter["begin"].tolist() == [0, 8, 0, 0]
    assert package.value(function.constants[function.operations[3].inputs["dtype"][0]]) == "fp32"
    assert package.weight_file_bytes == weight_file(path).stat().st_size
    assert package.n_bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_states_and_what_has_no_output(tmp_path):
    def body(x, s):
        kept = mb.add(x=mb.read_state(input=s), y=x)
        mb.coreml_update_state(state=s, value=kept, name="kept")
        return mb.relu(x=kept)

    function = read(tmp_path, body, value(1, 8, 1, 32), state(1, 8, 1, 32)).main
    assert function.inputs == {"x": Type("float16", (1, 8, 1, 32))}
    assert function.states == {"s": Type("float16", (1, 8, 1, 32))}
    written = function.operations[2]
    assert (written.kind, written.name, written.outputs) == ("write_state", "kept_write_state", ())


# ---- the manifest


def test_a_package_is_told_by_its_name_or_its_manifest(path, tmp_path):
    assert is_package(path)
    plain = path.rename(tmp_path / "plain")
    assert is_package(plain)
    for text in ("{}", "[]", "3", "", "{", "[" * 5000):
        (plain / "Manifest.json").write_text(text)
        assert not is_package(plain)
    (plain / "Manifest.json").unlink()
    assert not is_package(plain)
    assert not is_package(tmp_path / "absent.mlpackage")
    (tmp_path / "file.mlpackage").write_text("")
    assert not is_package(tmp_path / "file.mlpackage")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"rootModelIdentifier": "a"}', "\0", "\ud800", "[" * 5000,
        '{"itemInfoEntries": "text", "rootModelIdentifier": 9}',
    ],
    ids=range(10),
)  # fmt: skip
def test_a_manifest_that_is_none(path, text):
    (path / "Manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(BadInput, match=r"copy\.mlpackage: is no \.mlpackage \(its Manifest\.json"):
        Package(path)


def test_no_manifest_and_no_folder(path, tmp_path):
    (path / "Manifest.json").unlink()
    for none in (path, tmp_path / "absent", model_file(path)):
        with pytest.raises(BadInput, match=r"is no \.mlpackage"):
            Package(none)


@pytest.mark.parametrize(
    "root",
    [
        "../../outside.mlmodel", "/etc/passwd", "..", "", "absent.mlmodel", "a\0b", "x" * 5000,
        "com.apple.CoreML", 3, None, [], {"a": 1},
    ],
    ids=range(12),
)  # fmt: skip
def test_a_manifest_that_names_another_file(path, root):
    shutil.copy(model_file(path), path.parent / "outside.mlmodel")
    manifest = json.loads((path / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = root
    (path / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"copy\.mlpackage: "):
        Package(path)


def test_a_model_that_lies_outside_by_a_link(path):
    outside = path.parent / "outside.mlmodel"
    model_file(path).rename(outside)
    model_file(path).symlink_to(outside)
    with pytest.raises(BadInput, match="its model file .* is missing"):
        Package(path)


# ---- the model


def test_models_that_are_cut(path):
    data = model_file(path).read_bytes()
    refused = 0
    for size in range(0, len(data), 7):
        model_file(path).write_bytes(data[:size])
        try:
            used(path)
        except BadInput:
            refused += 1
    assert refused == -(-len(data) // 7)


def test_a_model_larger_than_a_protobuf_is_not_loaded(path, monkeypatch):
    size = model_file(path).stat().st_size
    monkeypatch.setattr(package_module, "_LARGEST_MODEL", size)
    Package(path)
    monkeypatch.setattr(package_module, "_LARGEST_MODEL", size - 1)
    with pytest.raises(BadInput, match="more bytes than a protobuf can"):
        Package(path)


def test_a_neural_network_is_refused(path):
    with pytest.raises(BadInput, match="is not an ML Program but a neuralNetwork"):
        edited(path, lambda spec: spec.neuralNetwork.SetInParent())
    with pytest.raises(BadInput, match="is not an ML Program but a None"):
        edited(path, lambda spec: spec.ClearField("neuralNetwork"))


def _operations(spec):
    return spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations


def _of_type(spec, kind):
    return next(op for op in _operations(spec) if op.type == kind)


def _rename_function_version(spec):
    spec.mlProgram.functions["main"].opset = "CoreML99"


def _nest(spec):
    _of_type(spec, "mul").blocks.add()


def _flexible(spec):
    kind = spec.mlProgram.functions["main"].inputs[0].type.tensorType
    kind.dimensions[3].unknown.SetInParent()


def _unknown_type(spec):
    spec.mlProgram.functions["main"].inputs[0].type.tensorType.dataType = 40


def _list_type(spec):
    spec.mlProgram.functions["main"].inputs[0].type.listType.SetInParent()


def _read_nothing(spec):
    _of_type(spec, "mul").inputs["x"].arguments[0].name = "absent"


def _read_what_follows(spec):
    _of_type(spec, "conv").inputs["x"].arguments[0].name = "y"


def _give_nothing(spec):
    spec.mlProgram.functions["main"].block_specializations["CoreML8"].outputs[0] = "absent"


def _other_file(spec):
    constant = next(op for op in _operations(spec) if op.outputs[0].name == "table")
    constant.attributes["val"].blobFileValue.fileName = "@model_path/weights/other.bin"


def _two_names(spec):
    _of_type(spec, "const").outputs.add().name = "second"


def _no_name(spec):
    del _of_type(spec, "const").outputs[:]


def _no_value(spec):
    del _of_type(spec, "const").attributes["val"]


def _axis(spec):
    """The constant that is concat's axis."""
    (name,) = (a.name for a in _of_type(spec, "concat").inputs["axis"].arguments)
    return next(op for op in _operations(spec) if op.outputs[0].name == name).attributes["val"]


def _huge(spec):
    _axis(spec).type.tensorType.dimensions.add().constant.size = 1 << 62


def _too_large_for_its_type(spec):
    _axis(spec).immediateValue.tensor.ints.values[0] = 1 << 20
    _axis(spec).type.tensorType.dataType = 21


def _bytes_of_half_a_number(spec):
    _axis(spec).immediateValue.tensor.bytes.values = b"\0" * 3


def _of_a_dtype_without_numbers(spec):
    _axis(spec).type.tensorType.dataType = 35


def _empty_text(spec):
    _axis(spec).type.tensorType.dataType = 2


def _of_no_value(spec):
    _axis(spec).immediateValue.Clear()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: spec.mlProgram.functions.clear(), "has no function"),
        (_rename_function_version, "no operations for its version 'CoreML99'"),
        (_nest, "mul has a block of its own"),
        (_flexible, "extents that are not fixed"),
        (_unknown_type, "numbers of type 40"),
        (_list_type, "a value of type listType"),
        (_read_nothing, "reads 'absent', which nothing writes"),
        (_read_what_follows, "reads 'y', which nothing writes"),
        (_give_nothing, "its output 'absent' is written by nothing"),
        (_other_file, "has weights in '@model_path/weights/other.bin'"),
        (_two_names, "a constant has 2 names"),
        (_no_name, "a constant has 0 names"),
        (_no_value, "a value of type None"),
        (_huge, "a constant of int32 4611686018427387904 cannot be read"),
        (_too_large_for_its_type, "a constant of int8 number cannot be read"),
        (_bytes_of_half_a_number, "a constant of int32 number cannot be read"),
        (_of_a_dtype_without_numbers, "a constant of uint4 number cannot be read"),
        (_empty_text, "a constant of string number cannot be read"),
        (_of_no_value, "a constant of int32 number cannot be read"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_models_that_are_damaged_within(path, edit, message):
    with pytest.raises(BadInput, match=message):
        edited(path, edit)


def _damage(message):
    """Deletes or changes one field of a protobuf after another, and undoes it; yields while one is
    damaged."""
    for field, _ in message.ListFields():
        before = type(message)()
        before.CopyFrom(message)
        message.ClearField(field.name)
        yield
        message.CopyFrom(before)
        held = getattr(message, field.name)
        if field.message_type is None:
            for other in {1: [-1, 0], 3: [-1, 1 << 40], 4: [0, 1 << 63], 8: [], 9: ["x", ""]}.get(
                field.type, [0, 7]
            ):
                if field.is_repeated:
                    held[:] = [other, other]
                elif field.type != field.TYPE_BYTES:
                    setattr(message, field.name, other)
                yield
                message.CopyFrom(before)
                held = getattr(message, field.name)
        elif field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for key in list(held):
                    yield from _damage(held[key])
        else:
            for each in held if field.is_repeated else [held]:
                yield from _damage(each)


def test_every_field_of_a_model_may_be_wrong(path):
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(model_file(path).read_bytes())
    accepted = refused = 0
    for _ in _damage(spec.mlProgram):
        try:
            model_file(path).write_bytes(spec.SerializeToString())
        except ValueError:
            continue
        try:
            used(path)
            accepted += 1
        except BadInput:
            refused += 1
    assert accepted > 100
    assert refused > 300


def test_random_bytes_of_a_model(path):
    """One of them; tests/fuzz.py does worse to its format coreml-model."""
    edited(path, lambda spec: None)  # the order of its maps is no longer chance
    data = model_file(path).read_bytes()
    random = np.random.default_rng(0)
    accepted = refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] = random.integers(256)
        model_file(path).write_bytes(damaged)
        try:
            used(path)
            accepted += 1
        except BadInput:
            refused += 1
    assert min(accepted, refused) > 15


# ---- the weights


def _record(path, name="table"):
    constant = Package(path).main.constants[name]
    return constant.offset


@pytest.mark.parametrize("cut", [1, 2048, 2049, 5000])
def test_weights_that_are_cut(path, cut):
    data = weight_file(path).read_bytes()
    weight_file(path).write_bytes(data[:-cut])
    package = Package(path)
    whole = {offset: _end(data, offset) for offset in (_record(path), _record(path, "weight"))}
    for name in ("table", "weight"):
        if whole[_record(path, name)] <= len(data) - cut:
            package.value(package.main.constants[name])
            continue
        with pytest.raises(BadInput, match=r"weight\.bin: its weights at \d+ are damaged"):
            package.value(package.main.constants[name])


def _end(data, offset):
    n_bytes, start = struct.unpack_from("<QQ", data, offset + 8)
    return start + n_bytes


@pytest.mark.parametrize(
    ("at", "form", "number"),
    [
        (0, "<I", 0xDEADBEEE),
        (4, "<I", 2),
        (4, "<I", 0),
        (4, "<I", 99),
        (8, "<Q", 2046),
        (8, "<Q", 0),
        (8, "<Q", 1 << 63),
        (16, "<Q", 1 << 40),
        (16, "<Q", (1 << 63) - 1),
        (16, "<Q", (1 << 64) - 2),
    ],
    ids=str,
)
def test_records_that_are_wrong(path, at, form, number):
    data = bytearray(weight_file(path).read_bytes())
    struct.pack_into(form, data, _record(path) + at, number)
    weight_file(path).write_bytes(data)
    package = Package(path)
    with pytest.raises(BadInput, match=r"weight\.bin: its weights at \d+ are damaged"):
        package.value(package.main.constants["table"])


def test_weights_that_are_missing_or_a_folder(path):
    weight_file(path).unlink()
    for _ in range(2):
        package = Package(path)
        with pytest.raises(BadInput, match="are damaged"):
            package.value(package.main.constants["table"])
        weight_file(path).mkdir(exist_ok=True)


@pytest.mark.parametrize("offset", [0, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_constants_at_other_places(path, offset):
    def move(spec):
        constant = next(op for op in _operations(spec) if op.outputs[0].name == "table")
        constant.attributes["val"].blobFileValue.offset = offset

    package = edited(path, move)
    with pytest.raises(BadInput, match=f"its weights at {offset} are damaged"):
        package.value(package.main.constants["table"])

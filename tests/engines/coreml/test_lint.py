"""Each rule on a tiny program, saved and read back, on both sides of its boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onelaunch.config import preset
from onelaunch.errors import BadInput
from onelaunch.plan import make_plan
from tests.engines.suite import SHAPES, SMALL, weights_of

pytest.importorskip("coremltools")

from coremltools.converters.mil import Builder as mb

from onelaunch.engines.coreml import backward, coremltools, emit, lint, pack
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.lint import Finding
from onelaunch.engines.coreml.package import Package
from tests.engines.coreml.tiny import built, edited, noise, read, state, value, weight_file

coremltools("a test")

WIDE = value(1, 8, 1, 64)


@pytest.fixture
def findings(tmp_path):
    """Of a program by its body: severity, first operation, rule, count."""

    def find(body, *inputs):
        found = lint.lint(read(tmp_path, body, *inputs))
        return [(each.severity, each.operation, each.rule, each.count) for each in found]

    return find


def test_nothing_is_found_in_what_keeps_to_the_rules(findings):
    assert findings(lambda x: mb.mul(x=mb.relu(x=x), y=np.float16(2)), WIDE) == []


# ---- values


@pytest.mark.parametrize(("rank", "expected"), [(5, []), (6, [("error", "relu_0", "rank", 1)])])
def test_rank(tmp_path, rank, expected):
    """coremltools builds no sixth axis."""

    def add_axes(spec):
        (relu,) = spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        dimensions = relu.outputs[0].type.tensorType.dimensions
        for _ in range(rank - len(dimensions)):
            dimensions.insert(0, dimensions[0])

    package = edited(built(tmp_path, lambda x: mb.relu(x=x), WIDE), add_axes)
    assert len(package.main.types["relu_0"].shape) == rank
    found = lint.lint(package)
    assert [(each.severity, each.operation, each.rule, each.count) for each in found] == expected


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_inputs_and_outputs_of_other_dtypes(findings, dtype):
    def to_half(x):
        return mb.cast(x=x, dtype="fp16")

    def from_half(x):
        return mb.cast(x=x, dtype={"float32": "fp32", "int32": "int32"}[dtype])

    shape = WIDE[1]
    assert findings(to_half, value(*shape, dtype=dtype)) == [("cpu", "x", "dtype", 1)]
    assert findings(from_half, WIDE) == [("cpu", "cast_0", "dtype", 1)]


def test_other_dtypes_within(findings, tmp_path):
    def single(x):
        wide = mb.exp(x=mb.cast(x=x, dtype="fp32"))
        return mb.cast(x=wide, dtype="fp16")

    def chosen(x):
        return mb.select(cond=mb.greater(x=x, y=np.float16(0)), a=x, b=np.float16(0))

    assert findings(single, WIDE) == [("cpu", "cast_0", "dtype", 2)]
    assert findings(chosen, WIDE) == []  # a truth value may be computed, not given


@pytest.mark.parametrize(
    ("extent", "times", "severity"),
    [
        (1, "padded to 32, 32 times", "slow"),
        (7, "padded to 32, 4.57 times", "slow"),
        (31, "padded to 32, 1.03 times", "slow"),
        (32, None, None),
        (33, "padded to 64, 1.94 times", "note"),
        (64, None, None),
        (100, "padded to 128, 1.28 times", "note"),
    ],
)
def test_the_last_axis(tmp_path, extent, times, severity):
    found = lint.lint(read(tmp_path, lambda x: mb.relu(x=x), value(1, 8, 1, extent)))
    if times is None:
        assert found == []
        return
    (finding,) = found
    assert (finding.severity, finding.rule, finding.count) == (severity, "last axis", 2)
    assert f"last axis of {extent} is {times} the bytes" in finding.text


def test_a_last_axis_within_may_be_of_any_length_from_32(findings):
    def body(x):
        return mb.concat(values=mb.split(x=x, split_sizes=[33, 31], axis=3), axis=3)

    found = findings(body, WIDE)
    assert [each for each in found if each[2] == "last axis"] == [
        ("slow", "split_0_1", "last axis", 1)
    ]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 1, 16_384), []),
        ((1, 1, 1, 16_416), [("error", "x", "extent", 2)]),
        ((1, 1, 16_384, 32), []),
        ((1, 1, 16_385, 32), [("error", "x", "extent", 2)]),
        ((1, 16_384, 1, 32), []),
        ((1, 16_385, 1, 32), [("note", "x", "extent", 2)]),
        ((1, 65_536, 1, 32), [("note", "x", "extent", 2)]),
        ((1, 65_537, 1, 32), [("error", "x", "extent", 2)]),
        ((1, 1, 1, 65_568), [("error", "x", "extent", 2)]),
    ],
)
def test_extents(tmp_path, shape, expected):
    found = lint.lint(read(tmp_path, lambda x: mb.relu(x=x), value(*shape)))
    assert [(each.severity, each.operation, each.rule, each.count) for each in found] == expected
    if expected and expected[0][0] == "error":
        assert ("before A16" in found[0].text) == (max(shape) <= 65_536)


@pytest.mark.parametrize(("width", "severities"), [(64, ["note"]), (48, ["note", "error"])])
def test_states(tmp_path, width, severities):
    def body(x, s):
        kept = mb.add(x=mb.read_state(input=s), y=x)
        mb.coreml_update_state(state=s, value=kept)
        return mb.relu(x=kept)

    package = read(tmp_path, body, value(1, 8, 1, width), state(1, 8, 1, width))
    found = [each for each in lint.lint(package) if each.rule == "state"]
    assert [each.severity for each in found] == severities
    assert {each.operation for each in found} == {"s"}
    assert "2553" in found[0].text
    assert all("2631" in each.text for each in found[1:])


# ---- constants and files


@pytest.mark.parametrize("size", [3, 64], ids=["in place", "in the file"])
@pytest.mark.parametrize(
    ("number", "dtype", "fits"),
    [
        (65504, np.float16, True),
        (-65504, np.float16, True),
        (-4e4, np.float16, True),
        (np.inf, np.float16, False),
        (-np.inf, np.float16, False),
        (np.nan, np.float16, False),
        (65504, np.float32, True),
        (65504.1, np.float32, False),
        (-1e9, np.float32, False),
    ],
)
def test_constants(tmp_path, number, dtype, fits, size):
    numbers = np.ones((1, size, 1, 1), dtype)
    numbers[0, -1] = number

    def body(x):
        return mb.add(x=x, y=mb.const(val=numbers, name="table"))

    given = value(1, size, 1, 64, dtype=numbers.dtype.name)
    found = lint.lint(read(tmp_path, body, given))
    wrong = [each for each in found if each.rule == "constant"]
    expected = [] if fits else [("error", "table", 1)]
    assert [(each.severity, each.operation, each.count) for each in wrong] == expected


def test_a_long_constant_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "_CHUNK", 50)
    for place in (0, 49, 50, 63):
        table = np.zeros((1, 1, 1, 64), np.float16)
        table[..., place] = -np.inf

        def body(x, *, y=table):
            return mb.add(x=x, y=y)

        package = read(tmp_path, body, WIDE)
        assert [each.rule for each in lint.lint(package)] == ["constant"]


def test_a_constant_that_many_read_is_one_finding(findings):
    def body(x):
        mask = mb.const(val=np.full((1, 1, 1, 64), -np.inf, np.float16), name="mask")
        other = mb.const(val=np.full((1, 1, 1, 64), np.nan, np.float16), name="other")
        return mb.add(x=mb.add(x=mb.add(x=x, y=mask), y=mask), y=other)

    assert findings(body, WIDE) == [("error", "mask", "constant", 2)]


def test_damaged_weights_are_said(tmp_path):
    path = built(tmp_path, lambda x: mb.add(x=x, y=noise(1, 8, 1, 64)), WIDE)
    weight_file(path).write_bytes(weight_file(path).read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"weight\.bin: its weights at 64 are damaged"):
        lint.lint(Package(path))


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (1_000_000_000, []),
        (1_000_000_001, [("note", "weight.bin", "weights")]),
        (2_147_483_648, [("note", "weight.bin", "weights")]),
        (2_147_483_649, [("error", "weight.bin", "weights")]),
    ],
)
def test_weights(tmp_path, n_bytes, expected):
    path = built(tmp_path, lambda x: mb.add(x=x, y=noise(1, 8, 1, 64)), WIDE)
    with open(weight_file(path), "r+b") as file:
        file.truncate(n_bytes)  # a file with a hole
    found = lint.lint(Package(path))
    assert [(each.severity, each.operation, each.rule) for each in found] == expected


# ---- operations


OFF = {
    "gather": lambda x: mb.gather(x=x, indices=np.array([1, 0], np.int32), axis=1),
    "gather_nd": lambda x: mb.gather_nd(x=x, indices=np.array([[0, 1]], np.int32)),
    "gather_along_axis": lambda x: mb.gather_along_axis(
        x=x, indices=np.zeros((1, 8, 1, 64), np.int32), axis=1
    ),
    "topk": lambda x: mb.topk(x=x, k=2, axis=1)[0],
    "argsort": lambda x: mb.cast(x=mb.argsort(x=x, axis=1), dtype="fp16"),
    "cumsum": lambda x: mb.cumsum(x=x, axis=1),
    "reduce_prod": lambda x: mb.reduce_prod(x=x, axes=[1], keep_dims=True),
    "sin": lambda x: mb.sin(x=x),
    "tan": lambda x: mb.tan(x=x),
    "scatter_along_axis": lambda x: mb.scatter_along_axis(
        data=x, indices=np.zeros((1, 8, 1, 64), np.int32), updates=x, axis=1
    ),
    "gru": lambda x: mb.gru(
        x=mb.reshape(x=x, shape=[8, 1, 64]),
        initial_h=noise(1, 32),
        weight_ih=noise(96, 64),
        weight_hh=noise(96, 32),
    )[0],
}


@pytest.mark.parametrize("kind", OFF)
def test_operations_that_fall_off(tmp_path, kind):
    found = lint.lint(read(tmp_path, OFF[kind], WIDE))
    (finding,) = (each for each in found if each.severity == "cpu")
    assert (finding.rule, finding.count) == ("operation", 1)
    assert finding.text.startswith(f"{kind} ")
    assert ("embedding" in finding.text) == kind.startswith("gather")


def test_every_kind_that_falls_off_is_one_of_core_mls():
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    hyperbolic = {"acosh", "asinh"}  # Core ML's, though the builder has them not
    assert lint._OFF.keys() - SSAOpRegistry.core_ops.keys() == {"custom_layer", *hyperbolic}
    assert set(lint._PRODUCTS) <= SSAOpRegistry.core_ops.keys()


@pytest.mark.parametrize(
    ("kind", "severity"), [("custom_layer", "cpu"), ("relu", None), ("of_tomorrow", "note")]
)
def test_operations_of_others(tmp_path, kind, severity):
    def rename(spec):
        function = spec.mlProgram.functions["main"]
        function.block_specializations["CoreML8"].operations[0].type = kind

    found = lint.lint(edited(built(tmp_path, lambda x: mb.relu(x=x), WIDE), rename))
    assert [each.severity for each in found] == ([severity] if severity else [])


@pytest.mark.parametrize(("step", "expected"), [(1, []), (2, [("cpu", "conv_0", "operation", 1)])])
def test_dilated_convolutions(findings, step, expected):
    def body(x):
        weight = noise(8, 8, 1, 3)
        return mb.conv(x=x, weight=weight, dilations=[1, step], pad_type="same")

    assert findings(body, WIDE) == expected


def test_linear(findings):
    def body(x):
        return mb.linear(x=x, weight=noise(32, 64))

    assert findings(body, value(8, 64)) == [("slow", "linear_0", "operation", 1)]


@pytest.mark.parametrize(
    ("axis", "slow"), [(0, False), (1, False), (-3, False), (2, True), (3, True), (-1, True)]
)
def test_softmax_over_channels_alone(findings, axis, slow):
    expected = [("slow", "softmax_0", "layout", 1)] if slow else []
    assert findings(lambda x: mb.softmax(x=x, axis=axis), value(1, 8, 4, 64)) == expected


@pytest.mark.parametrize(
    ("body", "moves"),
    [
        (lambda x: mb.transpose(x=x, perm=[0, 2, 1, 3]), False),
        (lambda x: mb.transpose(x=x, perm=[0, 2, 1, -1]), False),
        (lambda x: mb.transpose(x=x, perm=[0, 3, 2, 1]), True),
        (lambda x: mb.reshape(x=x, shape=[2, 32, 1, 64]), False),
        (lambda x: mb.reshape(x=x, shape=[1, 32, 1, 128]), True),
    ],
)
def test_what_moves_the_last_axis(findings, body, moves):
    expected = [("slow", "layout", 1)] if moves else []
    found = findings(body, value(1, 64, 1, 64))
    assert [(severity, rule, count) for severity, _, rule, count in found] == expected


def _by_size(begin, size):
    return lambda x: mb.slice_by_size(x=x, begin=[0, 0, 0, begin], size=[1, 8, 1, size])


def _by_index(begin, end, **more):
    return lambda x: mb.slice_by_index(x=x, begin=[0, 0, 0, begin], end=[1, 8, 1, end], **more)


SLICES = {
    "all by size": (_by_size(0, 64), None),
    "all by -1": (_by_size(0, -1), None),
    "the start by size": (_by_size(0, 32), "start"),
    "the end by size": (_by_size(32, 32), "within"),
    "the end by -1": (_by_size(32, -1), "within"),
    "channels by size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 4, 0, 0], size=[1, 4, 1, 64]),
        None,
    ),
    "all by index": (_by_index(0, 64), None),
    "all by mask": (_by_index(5, 9, begin_mask=[False] * 3 + [True], end_mask=[True] * 4), None),
    "the start by index": (_by_index(0, 32), "start"),
    "the start by a mask": (_by_index(9, 32, begin_mask=[True] * 4), "start"),
    "the start from the end": (_by_index(-64, 32), "start"),
    "the end by index": (_by_index(32, 64), "within"),
    "the end from the end": (_by_index(-32, 64), "within"),
    "every second": (_by_index(0, 64, stride=[1, 1, 1, 2]), "start"),
    "one": (_by_index(5, 6, squeeze_mask=[False] * 3 + [True]), "within"),
    "parts": (lambda x: mb.split(x=x, num_splits=2, axis=3)[0], "within"),
    "parts from the end": (lambda x: mb.split(x=x, num_splits=2, axis=-1)[1], "within"),
    "parts of channels": (lambda x: mb.split(x=x, num_splits=2, axis=1)[1], None),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices_of_the_last_axis(tmp_path, case):
    body, cut = SLICES[case]
    found = [f for f in lint.lint(read(tmp_path, body, WIDE)) if f.rule == "width slice"]
    assert [each.severity for each in found] == (["slow"] if cut else [])
    if cut:
        assert ("before A16 what is beyond 4,094 becomes infinite" in found[0].text) == (
            cut == "within"
        )


def test_a_slice_whose_start_is_computed(tmp_path):
    def body(x, at):
        return mb.slice_by_size(x=x, begin=at, size=[1, 8, 1, 32])

    package = read(tmp_path, body, WIDE, value(4, dtype="int32"))
    (finding,) = (each for each in lint.lint(package) if each.rule == "width slice")
    assert "becomes infinite" in finding.text


@pytest.mark.parametrize(
    ("shape", "masked", "severities"),
    [
        ((1, 64, 496, 64), False, []),
        ((1, 64, 496, 64), True, ["error"]),
        ((1, 63, 496, 64), False, ["cpu"]),
        ((1, 64, 495, 64), False, ["cpu"]),
        ((1, 64, 496, 32), False, ["cpu"]),
        ((8, 496, 64), False, ["cpu"]),
        ((1, 4, 32, 64), True, ["error", "cpu"]),
    ],
)
def test_attention_in_one_operation(tmp_path, shape, masked, severities):
    mask = {"attn_mask": np.zeros((shape[-2], shape[-2]), np.float16)} if masked else {}

    def body(q):
        return mb.scaled_dot_product_attention(query=q, key=q, value=q, **mask)

    found = lint.lint(read(tmp_path, body, value(*shape)))
    assert [each.severity for each in found if each.rule == "attention"] == severities


# ---- the report


def test_what_many_share_is_one_finding_in_the_programs_order(tmp_path):
    def body(x):
        for _ in range(3):
            x = mb.cumsum(x=mb.linear(x=x, weight=noise(64, 64)), axis=0)
        return x

    found = lint.lint(read(tmp_path, body, value(8, 64)))
    assert [(each.operation, each.count) for each in found] == [("linear_0", 3), ("cumsum_0", 3)]
    assert str(found[1]) == "cpu: cumsum_0 and 2 more: cumsum has no form on the Neural Engine"
    assert str(Finding("note", "a", "rule", "b")) == "note: a: b"


def test_functions_are_told_apart(tmp_path):
    def add_function(spec):
        functions = spec.mlProgram.functions
        functions["short"].CopyFrom(functions["main"])

    package = edited(built(tmp_path, lambda x: mb.cumsum(x=x, axis=1), WIDE), add_function)
    assert list(package.functions) == ["main", "short"]
    (finding,) = lint.lint(package)
    assert (finding.operation, finding.count) == ("main.cumsum_0", 2)


# ---- our own programs


def ours(tmp_path, config, sequence, depth, taps="none"):
    weights = weights_of(config)
    plan = make_plan(config, 1, sequence, all_positions=True)
    for number, launch in enumerate(emit.program_launches(plan, depth)):
        path = tmp_path / f"{number}.mlpackage"
        emit.save(emit.emit(plan, launch, pack.Packed(config, weights), taps), path)
        yield Package(path)


def of(package, *severities):
    return [each for each in lint.lint(package) if each.severity in severities]


@pytest.mark.parametrize("sequence", [32, 64])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_ours_run_there(tmp_path, config, sequence):
    config = config.with_(max_seq_len=64)
    for package in ours(tmp_path, config, sequence, config.n_layers, "full"):
        assert of(package, "error", "cpu", "note") == []
        for finding in of(package, "slow"):  # keys are turned, once for each head of them
            assert finding.text == "transpose changes the last axis: all of it is written anew"
            assert finding.count == config.n_layers * config.n_kv_heads


@pytest.mark.parametrize("taps", ["inputs", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_our_backward_runs_there(tmp_path, taps, qk_norm):
    config = SMALL.with_(max_seq_len=32, qk_norm=qk_norm)
    plan = make_plan(config, 1, 32, all_positions=True)
    launch, _ = emit.program_launches(plan, config.n_layers)
    packed = pack.Packed(config, weights_of(config))
    emit.save(backward.emit_backward(plan, launch, packed, taps), tmp_path / "b.mlpackage")
    assert of(Package(tmp_path / "b.mlpackage"), "error", "cpu", "note") == []


def test_ours_of_a_real_width_run_there(tmp_path):
    config = preset("stories15m").with_(n_layers=2)
    layers, head = ours(tmp_path, config, 256, 2)
    assert of(layers, "error", "cpu", "note") == []
    assert of(head, "error", "cpu", "slow") == []
    assert [each.text for each in of(head, "note")] == [
        "an axis of 32,000 is longer than 16,384, where others cut channels"
    ]


def test_of_ours_an_embedding_within_goes_to_the_cpu(tmp_path):
    config = SMALL.with_(max_seq_len=32)
    (package,) = ours(tmp_path, config, 32, "all")
    assert [(each.operation, each.rule) for each in of(package, "error", "cpu")] == [
        ("tokens", "dtype"),
        ("gather_0", "operation"),
    ]


# ---- magnitudes


def _product(x):
    return mb.matmul(x=x, y=x, transpose_y=True, name="y")


MAGNITUDES = {
    "a product": (_product, 32_752.0, 32_768.0, "32,752"),
    "a convolution": (
        lambda x: mb.conv(x=x, weight=noise(8, 8, 1, 1), name="y"),
        32_752.0,
        32_768.0,
        "32,752",
    ),
    "a slice within": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 0, 0, 32], size=[1, 8, 1, 32], name="y"),
        4_094.0,
        4_096.0,
        "4,094",
    ),
    "a slice of the start": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[1, 8, 1, 32], name="y"),
        65_504.0,
        65_536.0,
        "65,504",
    ),
    "another": (lambda x: mb.relu(x=x, name="y"), 65_504.0, float("nan"), "65,504"),
}


@pytest.mark.parametrize("case", MAGNITUDES)
def test_magnitudes(tmp_path, case):
    body, fits, does_not, limit = MAGNITUDES[case]
    function = read(tmp_path, body, WIDE).main
    assert lint.magnitudes(function, {"y": fits}) == []
    assert lint.magnitudes(function, {}) == []
    for too_large in (does_not, float("inf")):
        (finding,) = lint.magnitudes(function, {"y": too_large})
        assert (finding.severity, finding.operation, finding.count) == ("error", "y", 1)
        assert finding.text.endswith("65,504" if too_large == float("inf") else limit)


def test_magnitudes_of_what_was_watched(tmp_path):
    def body(x):
        large = mb.mul(x=x, y=np.float16(600))
        for _ in range(2):
            large = mb.add(x=_product_of(large), y=np.float16(0))
        return large

    def _product_of(x):
        return mb.matmul(x=x, y=np.eye(64, dtype=np.float16))

    evaluator = Evaluator(read(tmp_path, body, WIDE), "float16", watch=True)
    evaluator({"x": torch.full((1, 8, 1, 64), 54.0)})  # to 32,400
    assert lint.magnitudes(evaluator.function, evaluator.largest) == []
    evaluator({"x": torch.full((1, 8, 1, 64), 60.0)})  # to 36,000
    (finding,) = lint.magnitudes(evaluator.function, evaluator.largest)
    assert (finding.operation, finding.count) == ("matmul_0", 2)
    assert finding.text == "gives up to 36,000; a product or convolution is infinite beyond 32,752"

"""What takes Core ML's place in a child process: each does what its name says."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import numpy as np

from onelaunch.engines.coreml.backend import Interface, PlacedOperation
from onelaunch.engines.coreml.package import Package, Type
from onelaunch.errors import BadInput

COMPILER_FAILED = "E5RT: MILCompilerForANE error: Error=_ANECompiler : ANECCompile() FAILED"
SHAPE = (1, 3, 1, 5)


def hang():
    """As a call of Core ML hangs: with the interpreter's lock."""
    ctypes.PyDLL(None).sleep(600)


class Doubles:
    def __init__(self):
        self.calls = 0

    def load(self, package, folder, units):
        self.units = units
        (folder / "program.mlmodelc").write_text("compiled")
        given = {"x": Type("float16", SHAPE), "tokens": Type("int32", (1, 5))}
        return Interface(given, {"x_out": Type("float16", SHAPE), "ids": Type("int32", (1, 5))})

    def predict(self, inputs):
        self.calls += 1
        assert {each.dtype for each in inputs.values()} == {np.dtype("f4"), np.dtype("i4")}
        assert all(each.flags.c_contiguous and each.flags.writeable for each in inputs.values())
        return {"ids": inputs["tokens"] + 1, "x_out": 2 * inputs["x"]}, 1e-9

    def plan(self):
        return [
            PlacedOperation("a", "conv", "ne", ("ne", "cpu"), 0.5),
            PlacedOperation("b", "gather", "cpu", ("cpu",), 0.25),
            PlacedOperation("c", "softmax", "ne", ("ne", "gpu", "cpu"), 0.25),
            PlacedOperation("d", "identity", "unknown", (), None),
        ]


class Evaluates:
    """A real package, operation by operation."""

    def load(self, package, folder, units):
        from onelaunch.engines.coreml.evaluate import Evaluator

        self.evaluate = Evaluator(Package(package), "float16")
        return Interface.of(self.evaluate.function)

    def predict(self, inputs):
        return {name: each.numpy() for name, each in self.evaluate(inputs).items()}, None


class Wide(Doubles):
    """Eight megabytes in and out."""

    def load(self, package, folder, units):
        wide = Type("float16", (1, 2048, 1, 1024))
        return Interface({"x": wide}, {"x_out": wide})

    def predict(self, inputs):
        return {"x_out": inputs["x"] - 1}, None


class Sleeps(Doubles):
    def predict(self, inputs):
        time.sleep(0.2)
        return super().predict(inputs)


class GivesFloat64(Doubles):
    def predict(self, inputs):
        outputs, _ = super().predict(inputs)
        turned = np.asfortranarray(outputs["x_out"].astype(np.float64))
        return outputs | {"x_out": turned}, None


class RaisesAtLoad(Doubles):
    def load(self, package, folder, units):
        raise RuntimeError('{\n    NSLocalizedDescription = "it cannot be loaded";\n}')


class Refuses(Doubles):
    def load(self, package, folder, units):
        raise BadInput(f"{package}: is no .mlpackage")


class HangsAtLoad(Doubles):
    def load(self, package, folder, units):
        hang()


class ExitsAtLoad(Doubles):
    def load(self, package, folder, units):
        sys.exit("no room")


class KillsAtFirst(Doubles):
    def predict(self, inputs):
        os.write(2, f"\n{COMPILER_FAILED}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


class KillsOnTheNeuralEngine(KillsAtFirst):
    def predict(self, inputs):
        return super().predict(inputs) if self.units == "ne" else Doubles.predict(self, inputs)


class HangsOnGpu(KillsOnTheNeuralEngine):
    def predict(self, inputs):
        if self.units == "gpu":
            hang()
        return super().predict(inputs)


class Remarks(Doubles):
    def load(self, package, folder, units):
        os.write(2, f"a remark\n{COMPILER_FAILED}\nanother one\n".encode())
        return super().load(package, folder, units)


class WrongShape(Doubles):
    def predict(self, inputs):
        outputs, _ = super().predict(inputs)
        return outputs | {"x_out": outputs["x_out"][:, :, 0]}, None


class WrongShapeAtThird(Doubles):
    def predict(self, inputs):
        outputs, _ = super().predict(inputs)
        return outputs if self.calls != 3 else outputs | {"ids": outputs["ids"][:, :4]}, None


class LacksOutput(Doubles):
    def predict(self, inputs):
        outputs, _ = super().predict(inputs)
        return {"ids": outputs["ids"]}, None


class Noisy(Doubles):
    def load(self, package, folder, units):
        print("loading\n" * 30_000, flush=True)
        return super().load(package, folder, units)

    def predict(self, inputs):
        os.write(1, b'{"seconds": [0, 0, 0]}\n')
        print("predicting")
        return super().predict(inputs)


class HangsAtThird(Doubles):
    def predict(self, inputs):
        if self.calls == 2:
            hang()
        return super().predict(inputs)


class DiesAtThird(Doubles):
    def predict(self, inputs):
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().predict(inputs)


class PlansNothing(Doubles):
    def plan(self):
        raise ValueError("MLComputePlan is not supported.")

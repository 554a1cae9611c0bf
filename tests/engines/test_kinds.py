"""The kinds of stage have the same names and numbers wherever they are listed."""

from onelaunch.engines.cpu.native import stages as cpu_stages
from onelaunch.engines.cuda import blocking
from onelaunch.engines.cuda.tuning import space
from onelaunch.plan import KINDS, STAGE_KINDS
from tests.engines.suite import SMALL


def test_the_cpus_program_numbers_them_in_the_plans_order():
    assert [getattr(cpu_stages, kind.upper()) for kind in KINDS] == list(range(len(KINDS)))


def test_every_kind_of_the_cuda_engine_has_a_blocking_by_each_rule():
    for rule in (blocking.default, blocking.default_fused):
        for rows in (1, 64, 256, 1024):
            for itemsize in (2, 4):
                assert set(rule(SMALL, rows, itemsize)) == set(blocking.KINDS)


def test_every_kind_of_the_cuda_engine_can_be_tuned():
    for kind in blocking.KINDS:
        assert space.options(SMALL, 1, 256, 2, kind, 32)
    assert set(space.WRITES_X) == {k for k in KINDS if "x" in STAGE_KINDS[k].writes}

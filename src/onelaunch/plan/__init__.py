"""The execution plan of a model: pure data shared by every engine, without tensors or a device.

`make_plan` lists the stages of one forward with their reads, writes and cost; `launches` groups
them by fusion depth; `make_tiles` cuts them into tiles with dependencies; `make_training_plan`
lists the work of a training step. `check`, `check_launches`, `check_tiles` and `check_training`
validate the results.
"""

from onelaunch.plan.build import make_plan, unplanned
from onelaunch.plan.check import PlanError, check, check_launches
from onelaunch.plan.describe import describe
from onelaunch.plan.kinds import KINDS, LAYER_KINDS, NO_LAYER, STAGE_KINDS, Kind
from onelaunch.plan.launches import Depth, Launch, every_depth, launches, parse_depth
from onelaunch.plan.parts import Part, part_of
from onelaunch.plan.stages import Access, Buffer, Plan, Stage, Totals
from onelaunch.plan.tiles import TilePlan, Tiling, check_tiles, counts, make_tiles
from onelaunch.plan.training import (
    TrainingPlan,
    check_training,
    describe_training,
    make_training_plan,
)

__all__ = [
    "KINDS",
    "LAYER_KINDS",
    "NO_LAYER",
    "STAGE_KINDS",
    "Access",
    "Buffer",
    "Depth",
    "Kind",
    "Launch",
    "Part",
    "Plan",
    "PlanError",
    "Stage",
    "TilePlan",
    "Tiling",
    "Totals",
    "TrainingPlan",
    "check",
    "check_launches",
    "check_tiles",
    "check_training",
    "counts",
    "describe",
    "describe_training",
    "every_depth",
    "launches",
    "make_plan",
    "make_tiles",
    "make_training_plan",
    "parse_depth",
    "part_of",
    "unplanned",
]

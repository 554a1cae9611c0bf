"""A record of rows that a test has made."""

from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import write_record
from onelaunch.bench.experiments import MODULES, module_name
from onelaunch.checkpoints.atomic import read_json


def record_of(module, rows, folder):
    """As it is read back; its table is text, its picture one or none."""
    (name,) = (each for each in MODULES if module_name(each) == module.__name__)
    record = read_json(write_record(name, module.UNIT, rows, folder, "here"))
    text = module.table(record)
    assert text.startswith("# ")
    assert text.isascii()
    for finding in module.findings(record):
        assert set(finding.answers) <= PUBLISHED.keys()
    if hasattr(module, "draw"):
        assert module.draw(record) is not None
    return record

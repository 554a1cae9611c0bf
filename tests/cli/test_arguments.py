"""Messages name Python arguments; people see the options that they gave."""

import re

import pytest

from onelaunch.cli.arguments import with_options

OPTIONS = {"--threads", "--engine", "--fusion-depth", "--seq", "--run", "--resume", "--prompt"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("threads=0: must be from 1", "--threads 0: must be from 1"),
        ("engine='vulkan': must be cpu", "--engine vulkan: must be cpu"),
        ("fusion_depth='': must be", "--fusion-depth '': must be"),
        ("engine='a b': must be", "--engine 'a b': must be"),
        ('engine="it\'s": must be', "--engine it's: must be"),
        ("sequence=9: must be", "--seq 9: must be"),
        ("x: use engine='cpu', or engine='cuda' on", "x: use --engine cpu, or --engine cuda on"),
        ("x: resume=True continues, run=DIR is new", "x: --resume continues, --run DIR is new"),
        ("it is stuck; start again, with threads=1", "it is stuck; start again, with --threads 1"),
        ("temperature=-1.0: must be", "temperature=-1.0: must be"),  # not an option of the verb
        ("x: train.engine=cpu keeps it", "x: train.engine=cpu keeps it"),
        ("config.json: n_heads=3", "config.json: n_heads=3"),
        ("a = b, c == d", "a = b, c == d"),
    ],
)
def test_an_argument_becomes_its_option(message, shown):
    argv = [word for name in OPTIONS for word in (name, "x")]
    assert with_options(message, OPTIONS, argv) == shown


def test_what_was_not_given_as_an_option_is_not_called_one():
    assert with_options("threads=0: bad", OPTIONS, ["train", "recipe"]) == "threads=0: bad"
    assert with_options("threads=0: bad", OPTIONS, ["train", "--threads=0"]) == "--threads 0: bad"


RANDOM = ["generate", "stories260k", "--random", "--ids"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([*RANDOM, "--engine", "vulkan"], "--engine vulkan: must be auto, reference"),
        ([*RANDOM, "--engine", "cuda", "--threads", "2"], "--threads 2: the CUDA engine"),
        ([*RANDOM, "--engine", "coreml", "--threads", "2"], "--threads 2: --engine coreml"),
        (
            [*RANDOM, "--engine", "reference", "--fusion-depth", "half"],
            "--fusion-depth half: .*--engine cpu, or --engine cuda",
        ),
        ([*RANDOM, "--engine=cpu", "--fusion-depth=9"], "--fusion-depth 9: .*stage, half"),
        ([*RANDOM, "--temperature", "-1"], "--temperature -1.0: must be 0"),
        ([*RANDOM, "--top-k", "-1"], "--top-k -1: must be"),
        ([*RANDOM, "--top-p", "0"], "--top-p 0.0: must be"),
        ([*RANDOM, "--min-p", "2"], "--min-p 2.0: must be"),
        ([*RANDOM, "--repetition-penalty", "0"], "--repetition-penalty 0.0: must be"),
        ([*RANDOM, "--presence-penalty", "2.1"], "--presence-penalty 2.1: must be from -2 to 2"),
        ([*RANDOM, "--frequency-penalty=-3"], "--frequency-penalty -3.0: must be from -2 to 2"),
        ([*RANDOM, "--logit-bias", "3"], "--logit-bias 3: must be ID=X, such as 403=-100"),
        ([*RANDOM, "--logit-bias", "a=1"], "--logit-bias a=1: must be ID=X"),
        ([*RANDOM, "--logit-bias", "3=101"], "--logit-bias 3: 101.0 must be from -100 to 100"),
        ([*RANDOM, "--logit-bias=3=1", "--logit-bias=3=1"], "--logit-bias 3: .* twice"),
        (
            [*RANDOM, "--logit-bias", "512=1", "--engine", "reference"],
            "--logit-bias 512: .*vocabulary of 512",
        ),
        (["generate", ""], "MODEL is empty"),
        (
            ["generate", "stories15m"],
            "stories15m: .*preset.*--random",
        ),
        (["inspect", "nothing"], "nothing: no such file.*presets: stories260k, "),
        (
            ["export", "stories260k", "x.mlpackage", "--random", "--format=coreml", "--seq=513"],
            "--seq 513: .*from 1 .*512",
        ),
        (["train", "--set", "x"], "--set x: .*section.key=value"),
        (["train", "--resume", "--run", ".", "--set", "a.b=1"], "--set: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_names_options(onelaunch, argv, line):
    code, out, err = onelaunch(*argv)
    assert (code, out) == (2, "")
    assert re.match(f"onelaunch: {line}", err), err
    assert err.count("\n") == 1


def test_eval_speaks_of_no_option_that_it_has_not(onelaunch):
    for name in ("stories15m", "nothing"):
        code, _, err = onelaunch("eval", name, "--data", "stories")
        assert code == 2
        assert "--random" not in err
        assert err.startswith(f"onelaunch: {name}: ")

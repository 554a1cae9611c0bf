"""llama.cpp's own server tests, run against `onelaunch serve`.

python tests/llama_cpp.py TESTS MODEL [--out FILE]: TESTS is llama.cpp's folder tools/server/tests,
MODEL a GGUF of stories260K, the model of those tests. Needs their packages (requests, openai,
pytest, wget) in the interpreter that runs this; ours is started by its command, --serve. Prints
what passed, what does not apply with the reason, and what failed; exits 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

FILES = ("basic", "chat_completion", "completion", "ctx_shift", "security", "template", "tokenize")
NO_GRAMMAR = "grammars and schemas are not supported, and refused"
REFLECTED = "the name of another model, which newer versions do not send back either"
# (how a test's id begins, why it does not apply); the first that fits counts
EXCLUDED = (
    ("test_basic.py::test_load_split_model", "a file in parts, from the network"),
    ("test_basic.py::test_server_slots", "/slots cannot be switched off"),
    ("test_basic.py::test_no_webui", "the page cannot be switched off"),
    ("test_chat_completion.py::test_completion_with_response_format", NO_GRAMMAR),
    ("test_chat_completion.py::test_completion_with_json_schema", NO_GRAMMAR),
    ("test_chat_completion.py::test_completion_with_grammar", NO_GRAMMAR),
    ("test_chat_completion.py::test_chat_completion[codellama70b", REFLECTED),
    ("test_chat_completion.py::test_chat_completion_with_openai_library", REFLECTED),
    ("test_chat_completion.py::test_chat_template", "a debug field, __verbose"),
    ("test_chat_completion.py::test_return_progress", "progress of a prompt is not reported"),
    ("test_completion.py::test_completion_stream_with_openai_library_stops", "another model"),
    ("test_completion.py::test_n_probs_post_sampling", "probabilities after filters"),
    ("test_ctx_shift.py::test_ctx_shift_disabled_short_prompt[-1", "a GGUF of context 128"),
    ("test_ctx_shift.py::test_ctx_shift_enabled", "the context is not shifted"),
    ("test_security.py::test_cors_options", "CORS is off unless asked for, by its own rules"),
    ("test_security.py::test_local_media_file", "images"),
    ("test_template.py::test_date_inside_prompt", "variables that transformers does not set"),
    ("test_template.py::test_reasoning", "templates of models with a thinking switch"),
    ("test_template.py::test_system_message_prefix", "an option of llama.cpp"),
)
PLUGIN = """
import utils
utils.ServerPreset.load_all = staticmethod(lambda: None)  # models of other tests
# the words are those that llama.cpp's random numbers draw; the rest of the answer is compared
utils.match_regex = lambda regex, text: isinstance(text, str) and bool(text)
"""
SHIM = """
import os, sys
flags, args, skip = {}, sys.argv[1:], False
names = {"--port", "--host", "--temp", "--seed", "--alias", "--ctx-size", "--parallel",
         "--n-predict", "--api-key", "--chat-template", "--chat-template-file"}
for i, word in enumerate(args):
    if word in names:
        flags[word] = args[i + 1]
new = ["--host", flags["--host"], "--port", flags["--port"], "--temperature", flags["--temp"],
       "--seed", flags["--seed"], "--quiet"]
parallel = int(flags.get("--parallel", 1))
context = min(512, int(flags.get("--ctx-size", 512))) // parallel
new += ["--max-batch", str(parallel), "--context", str(context)]
if int(flags.get("--n-predict", -1)) > 0:
    new += ["--max-new-tokens", flags["--n-predict"]]
new += ["--name", flags.get("--alias", "gpt-3.5-turbo")]
if "--api-key" in flags:
    new += ["--api-key", flags["--api-key"]]
template = flags.get("--chat-template-file")
if flags.get("--chat-template") == "chatml":  # the one of models without a template
    del flags["--chat-template"]
if "--chat-template" in flags:
    template = os.path.join(os.path.dirname(__file__), flags["--port"] + ".jinja")
    known = dict(KNOWN)
    with open(template, "w") as file:
        file.write(known.get(flags["--chat-template"], flags["--chat-template"]))
if template:
    new += ["--chat-template", template]
os.execv(SERVE[0], [*SERVE, "serve", MODEL, *new])
"""
COMMAND_R = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ {'system': 'SYSTEM', 'user': 'USER', "
    "'assistant': 'CHATBOT'}[m.role] }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--serve", default=shutil.which("onelaunch"), help="our command")
    parser.add_argument("--out", type=Path, help="where the outcomes go, as JSON")
    parser.add_argument("-k", default="", help="pytest's own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder), args)
    failed = report(outcomes)
    if args.out:
        args.out.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")
    sys.exit(bool(failed))


def run(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """The outcome of each test by its id: passed, failed, skipped, or the reason for which it does
    not apply."""
    tests = folder / "tools" / "server" / "tests"
    shutil.copytree(args.tests, tests)
    templates = args.tests.parents[2] / "models" / "templates"
    shutil.copytree(templates, folder / "models" / "templates")
    shim, known = folder / "llama-server", [("command-r", COMMAND_R)]
    lines = (f"#!{sys.executable}", f"SERVE = {[str(Path(args.serve).absolute())]!r}",
             f"MODEL = {str(args.model.absolute())!r}", f"KNOWN = {known!r}", SHIM)  # fmt: skip
    shim.write_text("\n".join(lines))
    shim.chmod(0o755)
    (tests / "no_downloads.py").write_text(PLUGIN)
    outcomes: dict[str, str] = {}
    report_file = folder / "report.xml"
    names = [str(Path("unit") / f"test_{name}.py") for name in FILES]
    left_out = [f"--deselect=unit/{prefix}" for prefix, _ in EXCLUDED]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no_downloads", f"--junitxml={report_file}",
         "-v", *names, *left_out, *(["-k", args.k] if args.k else [])],
        cwd=tests,
        env=os.environ | {"LLAMA_SERVER_BIN_PATH": str(shim), "PYTHONPATH": str(tests)},
    )  # fmt: skip
    from xml.etree import ElementTree

    for case in ElementTree.parse(report_file).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('unit.')}.py::{case.get('name')}"
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        outcomes[name] = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
    return outcomes | {prefix: f"does not apply: {reason}" for prefix, reason in EXCLUDED}


def report(outcomes: dict[str, str]) -> list[str]:
    """Print the outcomes; returns the tests that failed."""
    kinds = ("passed", "failed", "skipped")
    for kind in kinds:
        print(f"{kind}: {sum(outcome == kind for outcome in outcomes.values())}")
    for name, outcome in sorted(outcomes.items()):
        if outcome not in ("passed", "skipped"):
            print(textwrap.shorten(f"{name}: {outcome}", 160))
    return [name for name, outcome in outcomes.items() if outcome == "failed"]


if __name__ == "__main__":
    main()

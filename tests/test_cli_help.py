"""Help, examples and names of options: every command, and what the program says of itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cryorecon.cli.command import OPTION_PANELS, examples, own_params, panel_of, record
from cryorecon.cli.main import app
from cryorecon.cli.reference import commands, reference

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
COMMANDS = {ctx.command_path: (command, ctx) for command, ctx in commands()}
EVERY = pytest.mark.parametrize(("command", "ctx"), COMMANDS.values(), ids=COMMANDS)
# Words in the name of an option for a quantity with a unit, and the unit its help must name.
UNITS = {
    "diameter": "A", "offset_range": "A", "resolution": "A", "first_resolution": "A",
    "last_resolution": "A", "defocus_min": "A", "defocus_max": "A", "astigmatism": "A",
    "noise_falloff": "A", "lowpass": "A", "pixel_size": "A/px", "resample": "A/px",
    "box": "px", "crop": "px", "size": "px", "input_size": "px", "phase_shift": "deg",
    "voltage": "kV", "cs": "mm", "b_factor": "A^2", "agree_to": "A", "within": "deg",
    "start_blur": "A",
}  # fmt: skip
# Numbers without a unit: counts, ratios, seeds.
PURE = {
    "third",
    "n", "snr", "view_clusters", "view_concentration", "amplitude_contrast", "seed", "threads",
    "starts", "subset", "heads", "images_seen", "wiener", "padding", "max_order", "noise_std",
    "checkpoint", "iterations", "learning_rate", "gaussians", "points", "pairs", "epochs", "batch",
    "instances", "observations", "width",
}  # fmt: skip
# One name for what is not quite the same in all commands.
OWN_WORDS = {"output", "mask", "method", "volume", "starts", "max_radius", "iterations", "box",
             "max_order", "model", "symmetry"}  # fmt: skip


def shown(*words: str, **env: str) -> str:
    """What a command line prints in a terminal of 80 columns."""
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "80", **env})
    assert result.exit_code == 0, result.output
    return result.output


def example_lines(command) -> list[str]:
    text = command.epilog.replace("\\\n", "")
    return [line for line in text.splitlines() if not line.startswith("#")]


def values(param, ctx) -> str:
    return param.display_type(ctx).strip("<>")


@EVERY
def test_help_has_known_groups_and_units(command, ctx):
    params = own_params(command, ctx)
    options = [p for p in params if p.param_type_name == "option"]
    assert 1 <= len([p for p in options if not p.hidden]) <= 15
    for param in params:
        assert panel_of(param) in OPTION_PANELS
        assert param.rich_help_panel is not None, param.name
        assert param.help, param.name
        assert param.help[0].isupper() or ":" in param.help or "," in param.help, param.help
    for param in options:
        assert not re.search(r"range$|float$|integer$", record(param, ctx)[0]), param.name
        if param.name in UNITS:
            assert f"[{UNITS[param.name]}]" in param.help, param.name
        elif re.search(r"\b(int|float)\b", values(param, ctx)) and param.name != "max_radius":
            assert param.name in PURE, f"{param.name}: which unit?"


@EVERY
def test_help_fits_80_columns_and_hides_little_used_options(command, ctx, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = command.get_help(ctx)
    whole = command.context_class(command, info_name=ctx.info_name, parent=ctx.parent)
    whole.meta["cryorecon.help_all"] = True
    everything = command.get_help(whole)
    whole.meta.clear()
    assert max(len(line) for line in [*text.splitlines(), *everything.splitlines()]) <= 80
    for param in own_params(command, ctx):
        if param.param_type_name == "argument":
            continue
        pattern = rf"(?m)^  .*{re.escape(param.opts[-1])}\b(?!-)"
        assert re.search(pattern, everything)
        if param.hidden:
            listed = text.partition("Examples:")[0]
            assert not re.search(rf"(?m)^  (-\w, )?{re.escape(param.opts[-1])}(?![-\w])", listed)
    assert ("--help-all" in text) == any(p.hidden for p in own_params(command, ctx))


@EVERY
def test_examples_parse(command, ctx):
    """Three or more; a misspelt option would stop the parser."""
    lines = example_lines(command)
    assert len(lines) >= 3
    assert len(re.findall(r"(?m)^# ", command.epilog)) == len(lines)
    path = ctx.command_path.split()
    for line in lines:
        words = shlex.split(line.partition(" | ")[0])
        assert words[: len(path)] == path
        parsed = command.make_context(path[-1], words[len(path) :], parent=ctx.parent)
        for param in own_params(command, ctx):
            assert param.required is False or parsed.params[param.name] is not None


def test_all_options_are_shown_on_demand():
    assert "--wiener" not in shown("reconstruct", "-h")
    assert "--wiener" in shown("reconstruct", "--help-all")


def test_commands_in_the_pages_parse():
    seen = 0
    for page in (PAGE.parents[1] / "README.md", *PAGE.parent.glob("*.md")):
        for block in re.findall(r"(?ms)^```\w*\n(.*?)^```", page.read_text("utf-8")):
            for line in re.findall(r"(?m)^cryorecon .*", block.replace("\\\n", "")):
                if "[OPTIONS]" in line:
                    continue
                words = shlex.split(line.partition(" | ")[0].partition(" #")[0])
                deep = 2 if " ".join(words[:2]) in COMMANDS else 3
                command, ctx = COMMANDS[" ".join(words[:deep])]
                command.make_context(words[deep - 1], words[deep:], parent=ctx.parent)
                seen += 1
    assert seen > 50


def test_a_misspelt_example_would_not_parse():
    command, ctx = COMMANDS["cryorecon fsc"]
    with pytest.raises(Exception, match=r"No such option: --algin. Did you mean --align\?"):
        command.make_context("fsc", ["a.mrc", "b.mrc", "--algin"], parent=ctx.parent)


def test_the_same_option_has_the_same_names_and_words_everywhere():
    seen: dict[str, tuple[str, object]] = {}
    for path, (command, ctx) in COMMANDS.items():
        for param in own_params(command, ctx):
            if param.param_type_name == "argument":
                continue
            if param.name == "continue_job":  # Names a job; elsewhere --continue is a flag.
                continue
            told = (sorted(param.opts), sorted(param.secondary_opts), param.is_flag)
            told += () if param.name in OWN_WORDS else (param.help, param.rich_help_panel)
            first, before = seen.setdefault(param.opts[-1], (path, told))
            assert told == before, f"{param.opts[-1]} of {first} and {path}"


def test_the_overview_and_help_name_every_command_by_what_it_is_for():
    for text in (shown(), shown("--help")):
        for path in COMMANDS:
            assert re.search(rf"(?m)^  {path.split()[1]} ", text), path
        heads = re.findall(r"(?m)^(\S.*):$", text)
        assert heads[:2] == ["Start", "Find a map"]
    assert max(len(line) for line in shown().splitlines()) <= 84
    assert len(shown().splitlines()) <= 40


def test_the_command_reference_is_current():
    assert PAGE.read_text("utf-8") == reference(), "python -m cryorecon.cli.reference > docs/..."


def test_long_examples_are_broken_before_options():
    command = "cryorecon fsc " + "x" * 50 + " --align --mask m.mrc -o out"
    text = examples(("why", command))
    assert max(map(len, text.splitlines())) <= 74
    assert text.splitlines()[1].endswith(" \\")
    joined = text.replace("\\\n", "").partition("\n")[2]
    assert shlex.split(joined) == shlex.split(command)


def test_bash_completion_is_written_and_works():
    env = {**os.environ, "_CRYORECON_COMPLETE": "source_bash"}
    command = [sys.executable, "-m", "cryorecon"]
    script = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "complete -o" in script
    assert "_CRYORECON_COMPLETE=complete_bash" in script
    env |= {"_CRYORECON_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for words, expected in (("abinitio --sym", "--symmetry"), ("moments est", "estimate")):
        env["COMP_WORDS"] = f"cryorecon {words}"
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert found.stdout.split() == [expected]
    assert "--show-completion" in shown("--help")

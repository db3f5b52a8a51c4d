"""The pages that people read first: their links lead somewhere, their commands work, and they name no package index."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").glob("*.md")],
    key=lambda path: path.as_posix(),
)
READMES = ("README.md", "README.ja.md")
TEXT = {".md", ".py", ".json", ".html", ".j2", ".txt", ".toml", ".cpp", ".h", ""}
INDEX_NAME = re.compile(r'pip3? install[^\n`"]*?(?<!checkout of )llm[-_]quantize\b|llm-quantize\[')


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", bare).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page if not name else page.parent / name
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_no_page_and_no_message_names_a_package_index() -> None:
    """Until the package is on one, everything is installed from a checkout (``errors.install_command``)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = os.fsdecode(listed.stdout).split("\0") if listed.returncode == 0 else []
    files = [ROOT / name for name in names if name] or [path for path in ROOT.rglob("*") if path.is_file()]
    own = {Path(__file__), ROOT / "pyproject.toml", ROOT / "Makefile"}
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:120]}"
        for path in files
        if path.suffix in TEXT and path not in own and path.is_file() and "data" not in path.parts
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if INDEX_NAME.search(line.replace("&#39;", "'"))
    ]
    assert found == []


def test_the_rule_sees_what_it_is_for() -> None:
    for line in ("pip install llm-quantize", "pip install 'llm-quantize[torch]==0.1.0'", "needs llm-quantize[torch]"):
        assert INDEX_NAME.search(line)
    for line in (
        "in a checkout of llm-quantize: pip install .",
        "pip install '.[a]'  # in a checkout of llm-quantize 1",
    ):
        assert not INDEX_NAME.search(line)


def commands(page: str) -> list[str]:
    """The indented lines of a page that are commands, without what is said beside them."""
    lines = re.findall(r"^    (\S.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_is_short_and_tests_itself_as_ci_does() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 720
    for page in READMES:
        assert "make test" in commands(page)
    ci = ROOT / ".ci" / "run"
    if ci.is_file():
        assert "make test" in ci.read_text(encoding="utf-8").splitlines()


def test_both_readmes_name_the_same_commands() -> None:
    english, japanese = ([re.sub(r"'[^']*'|\"[^\"]*\"", "''", one) for one in commands(page)] for page in READMES)
    assert english == japanese
    assert len(english) > 8


@pytest.mark.parametrize("page", READMES)
def test_the_first_commands_need_no_torch(page: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    first = [one for one in commands(page) if "demo-llama" in one]
    assert [shlex.split(one)[1] for one in first] == ["quantize", "run"]
    blocked = "import sys; sys.modules.update(torch=None, transformers=None); from llm_quantize.cli import main; main()"
    for one in first:
        words = [sys.executable, "-c", blocked, *shlex.split(one)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "out" / "demo-llama-Q4_K_M.gguf").is_file()


def test_the_table_of_who_loads_what_has_every_level() -> None:
    """One row for each level of each format, and the compute capabilities that ``recommend`` counts with."""
    from llm_quantize.advice.ways import WAYS
    from llm_quantize.formats.table import FORMATS

    text = (ROOT / "docs" / "reference" / "formats.md").read_text("utf-8")
    section = text.split("## Who loads what, and how that was checked")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "| `" in line]
    named = [
        (form.strip("` "), level, loaded)
        for form, levels, loaded, _ in rows
        for level in re.findall(r"`(\S+)`", levels)
    ]
    found = {(form, level): loaded for form, level, loaded in named}
    assert len(found) == len(named), "a level stands twice"
    wanted = {(form.name, level) for form in FORMATS.values() for level in form.levels if form.name != "gguf"}
    assert set(found) == wanted
    assert any(form.strip("` ") == "gguf" for form, *_ in rows)
    for way in WAYS:
        if way.runtime == "vllm":
            for level in getattr(way.find, "levels", ()):
                loaded = found[level.format, level.level]
                assert "vLLM" in loaded
                assert (f"{level.capability:.1f}" if level.capability else "CPUs") in loaded, level

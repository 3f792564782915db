"""The doctor names what is wrong with each set-up of the gallery, and finds nothing wrong with its healthy twin."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from gallery import GALLERY
from gallery_healthy import HEALTHY
from gallery_parts import Setup

from opsd.commands.doctor import with_warnings
from opsd.doctor import CHECKS, Examination, examine, refused
from opsd.errors import OPSDError, OPSDWarning

# A model of two random layers answers nothing: whether its teacher helps is tested on a real one.
STRUCTURAL = [name for name in CHECKS if name != "lift"]


def examined(setup: Setup, folder: Path) -> Examination:
    """What `opsd doctor` finds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OPSDWarning)
        try:
            examination = examine(setup.trainer(folder), only=STRUCTURAL)
        except OPSDError as error:
            examination = refused(error)
    return with_warnings(examination, caught)


def test_the_gallery_has_the_size_that_was_promised_and_names_its_sources() -> None:
    assert len(GALLERY) >= 70 and len(HEALTHY) >= 30
    assert all(case.source for case in GALLERY.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", GALLERY)
def test_the_doctor_names_what_is_wrong(name: str, tmp_path: Path) -> None:
    case = GALLERY[name]
    examination = examined(case.broken, tmp_path)
    told = [
        f
        for f in examination.with_status("warn", "fail")
        if re.fullmatch(case.check, f.check) and re.search(case.words, f.saw, re.DOTALL)
    ]
    assert told, [(f.check, f.status, f.saw) for f in examination.findings]
    assert told[0].status == case.status and (told[0].do or case.check.startswith("settings"))
    assert examination.failed == any(f.status == "fail" for f in examination.findings)


@pytest.mark.parametrize("name", GALLERY)
def test_the_doctor_finds_nothing_wrong_with_the_healthy_twin(name: str, tmp_path: Path) -> None:
    examination = examined(GALLERY[name].healthy, tmp_path)
    assert not [(f.check, f.status, f.saw) for f in examination.with_status("warn", "fail")]
    assert {f.check for f in examination.with_status("pass")} >= {
        "tokenizers",
        "alignment",
        "divergence",
        "prompts",
        "leaks",
    }


@pytest.mark.parametrize("name", HEALTHY)
def test_the_doctor_raises_no_false_alarm(name: str, tmp_path: Path) -> None:
    examination = examined(HEALTHY[name], tmp_path)
    told = [(f.check, f.status, f.saw) for f in examination.with_status("warn", "fail")]
    # where an answer is among choices, it says so, and that this may be as it should be
    assert [each for each in told if not (name.startswith("choices") and each[1] == "warn")] == []

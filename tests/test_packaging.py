"""What `pip install cachekd` puts on a user's disk."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from caches import ROOT


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_the_command_and_no_generic_name(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "cachekd = cachekd_cli.main:" in archive.read(entry_points).decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cachekd", "cachekd_cli"}
    assert "cachekd/report/templates/report.html.jinja" in names

"""Ask pip-audit for known vulnerabilities of pinned dependencies.

Exit code 0: all were examined, none is known. 1: some are known. 3: not all could be examined, which is what pip-audit
itself calls "no known vulnerabilities": a mirror of packages alone has no database of them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

OK, VULNERABLE, UNREACHABLE = 0, 1, 3
# Not a dependency of ours: it brings thirty of its own, and is run by hand.
COMMAND: Final = ("uv", "tool", "run", "pip-audit==2.*", "--progress-spinner", "off", "--format", "json")
OPTIONS: Final = ("--disable-pip", "--no-deps")


def judge(dependencies: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """The exit code and the lines to say, for the `dependencies` of pip-audit's JSON."""
    lines = [
        f"{dependency['name']} {dependency['version']}: {found['id']}, mended in {' '.join(found['fix_versions'])}"
        for dependency in dependencies
        for found in dependency.get("vulns", ())
    ]
    skipped = [dependency["name"] for dependency in dependencies if "vulns" not in dependency]
    examined = len(dependencies) - len(skipped)
    if skipped or not dependencies:
        lines.append(f"the database was not reached for {len(skipped)} of {len(dependencies)}: {' '.join(skipped)}")
    lines.append(f"{examined} examined")
    if any(dependency.get("vulns") for dependency in dependencies):
        return VULNERABLE, lines
    return UNREACHABLE if skipped or not dependencies else OK, lines


def main(files: Sequence[str]) -> int:
    requirements = [option for file in files for option in ("--requirement", file)]
    ended = subprocess.run((*COMMAND, *OPTIONS, *requirements), stdout=subprocess.PIPE, text=True, check=False)
    try:
        dependencies = json.loads(ended.stdout)["dependencies"]
    except (ValueError, KeyError):
        print("pip-audit has no answer: its database, or pip-audit itself, could not be reached", file=sys.stderr)
        return UNREACHABLE
    status, lines = judge(dependencies)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

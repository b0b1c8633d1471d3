"""`qwentune doctor`: what of this machine helps or hinders a run, with what mends it."""

from __future__ import annotations

import textwrap

from qwentune import console
from qwentune.errors import EXIT_OK, UsageError


def doctor() -> None:
    """Look at driver, libraries, memory, disk and hub; each is ok, a warning, or has to be mended."""
    console.end(console.run(run_doctor))


def run_doctor() -> int:
    """Prints a line for each thing, with its mend; the exit code says whether one has to be mended."""
    from qwentune.machine import findings

    failed = False
    looking = findings()
    while True:
        with console.busy("looking"):
            found = next(looking, None)
        if found is None:
            break
        failed |= found.state == "fail"
        console.show(f"{found.state:<5} {found.about}: {found.what}")
        if found.mend:
            console.show(textwrap.indent(found.mend, " " * 6))
    return UsageError.exit_code if failed else EXIT_OK


if __name__ == "__main__":
    console.main(doctor)

"""`python -m tests.fuzz FIRST LAST`: programs of these seeds, what became of them, in one table."""

from __future__ import annotations

import argparse
from collections import Counter

from tests.fuzz.check import Verdict, check
from tests.fuzz.programs import program


def main() -> None:
    """Run, print every failure with its program, and the rates."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--no-export", action="store_true")
    given = parser.parse_args()
    verbs = ("insert", "fold", "attach") + (() if given.no_export else ("export",))
    verdicts: list[Verdict] = []
    for seed in range(given.first, given.last):
        drawn = program(seed)
        verdict = check(drawn, verbs)
        verdicts.append(verdict)
        if verdict.wrong or verdict.raw:
            print(f"--- seed {seed}: {verdict.wrong[:3]} {verdict.raw[:2]}\n{drawn.source}")
        elif verdict.refused:
            print(f"seed {seed} refused: {verdict.refused}", flush=True)
    served = sum(bool({"insert", "attach"} & set(v.served)) for v in verdicts)
    wrong, raw = (sum(bool(getattr(v, w)) for v in verdicts) for w in ("wrong", "raw"))
    print(f"{len(verdicts)} programs, wrong {wrong}, raw {raw}, served {served}")
    print(Counter(verb for v in verdicts for verb in v.served))


if __name__ == "__main__":
    main()

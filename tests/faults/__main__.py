"""Kill runs at random moments, again and again: `python -m tests.faults --rounds 100`."""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="Runs that are killed and gone on with until they end.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that has started threads cannot be forked from
    from train.cli import calm_environment

    calm_environment()
    from tests.faults.harness import differences, import_everything, killed_run, whole_run
    from tests.models import write_mice, write_smallest_model

    import_everything()
    with tempfile.TemporaryDirectory(prefix="softprompt-faults-") as name:
        folder = Path(name)
        write_mice(folder / "mice", train=4, val=2)
        # Computed in a child, as all that is: a process that has computed cannot be forked from.
        writer = multiprocessing.get_context("fork").Process(target=write_smallest_model, args=(folder / "mice" / "model",))
        writer.start()
        writer.join()
        whole = whole_run(folder / "mice", folder / "whole")
        print(f"never killed: {whole.events} changes of files, {whole.seconds:.1f} s", flush=True)
        kills, lost, differing, began = 0, 0, 0, time.monotonic()
        for number in range(given.rounds):
            chance = random.Random(f"{given.seed}/{number}")
            try:
                story = killed_run(folder / "mice", folder / "round", whole, chance)
                found = differences(folder / "round", folder / "whole")
            except AssertionError as error:
                lost += 1
                print(f"round {number}: LOST: {error}", flush=True)
            else:
                kills += sum(": -9" in part for part in story)
                differing += bool(found)
                print(f"round {number}: {'; '.join(story)}: {'equal' if not found else f'DIFFERS in {found}'}", flush=True)
            shutil.rmtree(folder / "round")
        minutes = (time.monotonic() - began) / 60
        print(f"{given.rounds} rounds, {kills} kills, {minutes:.0f} min: {lost} runs lost, {differing} that differ")
    return 1 if lost or differing else 0


if __name__ == "__main__":
    sys.exit(main())

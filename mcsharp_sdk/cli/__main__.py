"""``python -m mcsharp_sdk.cli``, which torchrun can start: ``torchrun -m mcsharp_sdk.cli …``."""

from mcsharp_sdk.cli.main import run

if __name__ == "__main__":
    run()

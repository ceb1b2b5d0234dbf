"""``python -m dsd_fast`` and ``dsd-fast``: all commands by one name.

``dsd-fast train --prompt "an armchair"`` is ``python -m dsd_fast.train --prompt "an armchair"``.
"""

import difflib
import runpy
import sys

import dsd_fast
from dsd_fast.run.terminal import reader_may_leave

# Said here and not read from the modules: they load torch, which a list need not wait for.
COMMANDS = {
    "train": "a prompt, one picture or a mesh, and a seed, to a 3D object, a texture or an image",
    "refine": "a crisper texture on the mesh of a trained object",
    "sample": "images of a prompt straight from the diffusion model",
    "export": "a mesh or a video of a trained run",
    "evaluate": "compare methods, prompts and seeds: figures and pictures on one page",
    "evaluate.truth": "score runs from one picture against true views of its object",
    "info": "what was built, what was found, what each missing piece would bring",
    "convert": "a checkpoint in one file to a model's folder",
    "build_engine": "TensorRT engines of a model's UNet",
    "prior": "make, judge or replace the diffusion models in the package",
}


def main() -> None:
    """Run the command that the first argument names, with the rest as its flags.

    Ends with status 2 when there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    command = name.replace("-", "_")
    if command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"dsd_fast.{command}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help", "--version"):
        with reader_may_leave():
            print(f"dsd_fast {dsd_fast.__version__}")
            if name != "--version":
                print("\nusage: dsd-fast COMMAND [FLAGS]      COMMAND --help lists its flags\n")
                print("\n".join(f"  {name:<16}{what}" for name, what in COMMANDS.items()))
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f", expected {', '.join(COMMANDS)}"
        print(f"dsd_fast: there is no command {name!r}{hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()

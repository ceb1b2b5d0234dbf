"""One kind of work each: what a run draws, optimises and writes at the end.

`TASKS` has them by the name that `--task` asks for. The modules of this package register theirs; a
task of one's own is registered by the file that has it (`register`), imported before a command line
is read.
"""

from dsd_fast.tasks import image, refine, single_view, text, texture
from dsd_fast.tasks.base import TASKS, Task, register

__all__ = ["TASKS", "Task", "image", "refine", "register", "single_view", "text", "texture"]

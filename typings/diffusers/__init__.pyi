# For pyright all of diffusers is Any: its own annotations deny what its classes take, such as
# `.to(device)` and tuples of any length.
from typing import Any

def __getattr__(name: str) -> Any: ...

# For pyright all of transformers is Any: its own annotations deny what its classes take, such as
# `.to(device)`.
from typing import Any

def __getattr__(name: str) -> Any: ...

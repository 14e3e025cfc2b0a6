"""What of an SDK a script can name: `python names.py tinker`. See `tests/client/test_surface.py`.

    {"modules": {package: its __all__}, "types": names in `types`, "classes": {class: {member: parameters}}}

Parameters are as in a lambda, without types: "self, event_type='all', day=None". A property or a field is null.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from typing import Any

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient", "APIFuture")


def surface(package: str) -> dict[str, Any]:
    sdk = importlib.import_module(package)
    classes = {name: found for name in CLIENTS if (found := _client(sdk, name)) is not None}
    own_types = {name: value for name, value in vars(sdk.types).items() if name[0].isupper()}
    for name, value in own_types.items():
        if inspect.isclass(value) and value.__module__.split(".")[0] == "tinker":
            classes[f"types.{name}"] = value
    modules = {package: sdk} | ({"mint.mint": sdk.mint, "mint.tinker": sdk.tinker} if package == "mint" else {})
    return {
        "modules": {name: sorted(module.__all__) for name, module in modules.items()},
        "types": sorted(own_types),
        "classes": {name: members(cls) for name, cls in sorted(classes.items())},
    }


def _client(sdk: Any, name: str) -> type | None:
    """Before 0.38 `RestClient` is where only a service client gets at it."""
    interfaces = importlib.import_module("tinker.lib.public_interfaces")
    for place in (sdk, interfaces, importlib.import_module("tinker.lib.public_interfaces.rest_client")):
        if hasattr(place, name):
            return getattr(place, name)
    return None


def members(cls: type) -> dict[str, str | None]:
    """The public members of a class, of what it inherits only what is of its own package."""
    package = cls.__module__.split(".")[0]
    found: dict[str, str | None] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == package and not base.__module__.endswith("_models"):
            for name in vars(base):
                made = (cls.__name__, name) == ("ServiceClient", "__init__")
                if made or not name.startswith(("_", "model_config", "model_fields", "model_computed")):
                    found.setdefault(name, parameters(inspect.getattr_static(cls, name)))
    fields = dict.fromkeys(getattr(cls, "model_fields", ()))
    if dataclasses.is_dataclass(cls):
        fields = {field.name: None for field in dataclasses.fields(cls) if not field.name.startswith("_")}
    return dict(sorted({**found, **fields}.items()))


def parameters(static: Any) -> str | None:
    if not (inspect.isfunction(static) or isinstance(static, (classmethod, staticmethod))):
        return None
    signature = inspect.signature(static.__func__ if hasattr(static, "__func__") else static)
    kept = [_plain(parameter) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=kept, return_annotation=signature.empty))[1:-1]


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    simple = default is parameter.empty or default is None or isinstance(default, (bool, int, float, str))
    return parameter.replace(annotation=parameter.empty, default=default if simple else ...)


def page(found: dict[str, Any]) -> str:
    """As JSON with a class on a line, so that a difference can be read."""
    parts = []
    for part, content in found.items():
        if isinstance(content, dict):
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
            parts.append(f"{json.dumps(part)}: {{\n{lines}\n}}")
        else:
            parts.append(f"{json.dumps(part)}: {json.dumps(content)}")
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    sys.stdout.write(page(surface(sys.argv[1])))

"""`python -m serve.admin CONFIG list|alias|rollback|pin|unpin|retire|keys|key|revoke ...`: what a registry offers.

In: the TOML file that names the registry. Out: small files in it, each replaced atomically; every endpoint that
serves it follows within seconds, and one JSON object is the last line of stdout. Adapters come in through
`python -m pipeline publish CONFIG`.
"""

import argparse
import json
import sys
from typing import Any

from pipeline.config import load_config
from pipeline.publish import ALIAS, move_alias
from serve.access import EVERY, add_key, read_keys, remove_key
from serve.registry import Refused, Registry, Version


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.admin", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="TOML file")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, versions and scores")
    commands.add_parser("alias", help="let a name mean this version").add_argument("model", metavar="NAME@VERSION")
    commands.add_parser("rollback", help="let a name mean what it meant before").add_argument("model", metavar="NAME")
    commands.add_parser("pin", help="keep a name's live version in every engine").add_argument("model", metavar="NAME")
    commands.add_parser("unpin", help="let it come and go").add_argument("model", metavar="NAME")
    commands.add_parser("retire", help="serve a version no more").add_argument("model", metavar="NAME@VERSION")
    commands.add_parser("keys", help="ids and adapters of the API keys")
    key = commands.add_parser("key", help="make an API key; from the first one on, nobody is served without")
    key.add_argument("adapters", nargs="+", metavar="NAME", help=f"adapters that it may use; '{EVERY}' for all")
    commands.add_parser("revoke", help="forget an API key").add_argument("key_id", metavar="ID")
    options = parser.parse_args(arguments)
    try:
        registry = Registry(load_config(options.config).publish.registry)
        result = _command(registry, options)
    except (ValueError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def _command(registry: Registry, options: argparse.Namespace) -> Any:
    if options.command == "list":
        return {version.name: _describe(registry, version.name) for version in registry.live()}
    if options.command == "keys":
        keys = read_keys(registry.folder) or []
        return [{field: key[field] for field in ("id", "adapters", "created")} for key in keys]
    if options.command == "key":
        key_id, secret = add_key(registry.folder, options.adapters)
        return {"id": key_id, "key": secret}
    if options.command == "revoke":
        remove_key(registry.folder, options.key_id)
        return {"revoked": options.key_id}
    version = registry.resolve(options.model)
    alias = registry.alias(version.name)
    folder = registry.folder / version.name
    if options.command in ("alias", "retire") and "@" not in options.model:
        raise ValueError(f"{options.command} needs an exact version, as in {version.model_id}")
    if options.command == "alias":
        move_alias(folder, version.version)
    elif options.command == "rollback":
        usable = [old for old in alias["before"] if old not in alias["retired"]]
        if not usable:
            raise ValueError(f"{version.name!r} has meant no other version before {version.version}")
        move_alias(folder, usable[0], back=True)
    elif options.command == "retire":
        if version.version == alias["version"]:
            raise ValueError(f"{version.model_id} is what {version.name!r} means now; move the alias first")
        folder.write_json(ALIAS, alias | {"retired": [*alias["retired"], version.version]})
    else:
        folder.write_json(ALIAS, alias | {"pinned": options.command == "pin"})
    return _describe(registry, version.name)


def _describe(registry: Registry, name: str) -> dict[str, Any]:
    manifests = [registry.manifest(Version(name, version)) for version in registry.versions(name)]
    return registry.alias(name) | {
        "versions": [{field: m[field] for field in ("version", "created", "rank", "scores")} for m in manifests]
    }


if __name__ == "__main__":
    sys.exit(main())

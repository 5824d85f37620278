"""The options of `rs-mcp` that are about HTTP alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rs_tools.errors import AccessError
from rs_tools.imagery.uploads import UploadedFiles
from rs_tools.serving.addresses import is_any, is_loopback
from rs_tools.user_folder import make_user_folder

if TYPE_CHECKING:  # what only HTTP needs is imported when HTTP is served: on stdio the start is awaited
    from rs_tools.serving.http import HttpSettings
    from rs_tools.serving.oauth import JwtVerifier
    from rs_tools.serving.tokens import BearerTokens

RATE_LIMIT = 1200
_ONLY_HTTP = ("allowed_host", "allowed_origin", "tokens", "oauth_issuer", "oauth_resource", "oauth_scope", "uploads")


def add_http_options(parser: argparse.ArgumentParser) -> None:
    """`--http` and all that goes with it."""
    http = parser.add_argument_group("HTTP", "see docs/HTTP.md")
    http.add_argument("--http", action="store_true", help="serve streamable HTTP at http://HOST:PORT/mcp")
    http.add_argument("--host", default="127.0.0.1", help="address to serve on (default %(default)s)")
    http.add_argument("--port", type=int, default=8000, help="port to serve on (default %(default)s)")
    http.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that callers use for this server; repeatable (those of this machine are allowed)",
    )
    http.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose web pages may call, such as https://app.example.org; repeatable",
    )
    http.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="file of lines NAME TOKEN: the callers, and what each must send (Authorization: Bearer TOKEN)",
    )
    http.add_argument(
        "--oauth-issuer", metavar="URL", help="authorization server whose access tokens (JWT) are taken, by its issuer"
    )
    http.add_argument(
        "--oauth-resource",
        metavar="URL",
        help="public address of this server's /mcp: the audience that those tokens must be for",
    )
    http.add_argument(
        "--oauth-scope", action="append", default=[], metavar="SCOPE", help="scope that a token must have; repeatable"
    )
    http.add_argument(
        "--rate-limit",
        type=int,
        default=RATE_LIMIT,
        metavar="N",
        help="requests a minute of one caller (default %(default)s)",
    )
    http.add_argument(
        "--uploads", metavar="DIR", help="folder of its own for uploads, kept for an hour (default: in your cache)"
    )


def http_settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> HttpSettings | None:
    """The settings that the options name, None without --http; ends with a usage error where they do not fit."""
    if not options.http:
        for name in _ONLY_HTTP:
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} is for --http, which is not given")
        return None
    from rs_tools.serving.http import HttpSettings

    if options.oauth_issuer and options.tokens:
        parser.error("--tokens and --oauth-issuer exclude each other: callers prove who they are in one way")
    if bool(options.oauth_issuer) != bool(options.oauth_resource):
        parser.error("--oauth-issuer and --oauth-resource go together: who issues tokens, and for which address")
    if options.oauth_scope and not options.oauth_issuer:
        parser.error("--oauth-scope is for tokens of --oauth-issuer, which is not given")
    if not is_loopback(options.host):
        _check_public(parser, options)
    if not 0 <= options.port <= 65535:
        parser.error("--port must be from 0 (any free one) to 65535")
    if options.rate_limit < 1:
        parser.error("--rate-limit must be at least 1 request a minute")
    _check_names(parser, options)
    return HttpSettings(
        host=options.host,
        port=options.port,
        allowed_hosts=tuple(options.allowed_host),
        allowed_origins=tuple(options.allowed_origin),
        verifier=_verifier(parser, options),
        scopes=tuple(options.oauth_scope),
        per_minute=options.rate_limit,
    )


def uploads(parser: argparse.ArgumentParser, options: argparse.Namespace) -> UploadedFiles | None:
    """The folder of uploads, in this user's cache where none is named; None without --http."""
    if not options.http:
        return None
    from rs_tools.serving.tokens import current_caller

    try:
        return UploadedFiles(options.uploads or make_user_folder() / "uploads", current_caller)
    except (OSError, AccessError) as error:
        parser.error(f"--uploads cannot be made: {error}")


def _check_public(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not options.tokens and not options.oauth_issuer:
        # Everyone who reaches the port could read every image under the roots.
        parser.error(
            f"--host {options.host} can be reached from other machines, and callers are not authenticated: give "
            "--tokens, or --oauth-issuer and --oauth-resource, or serve on 127.0.0.1"
        )
    if is_any(options.host) and not options.allowed_host:
        parser.error(f"--host {options.host} needs --allowed-host: the name that callers use for this server")


def _check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in options.allowed_host:
        if "/" in name or "*" in name:
            parser.error(f"--allowed-host is a name such as perception.example.org, not {name!r}")
    for origin in options.allowed_origin:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2 or "*" in origin:
            parser.error(f"--allowed-origin is an origin such as https://app.example.org, not {origin!r}")


def _verifier(parser: argparse.ArgumentParser, options: argparse.Namespace) -> BearerTokens | JwtVerifier | None:
    from rs_tools.serving.oauth import JwtVerifier
    from rs_tools.serving.tokens import BearerTokens

    try:
        if options.tokens:
            return BearerTokens(options.tokens)
    except (OSError, ValueError) as error:
        parser.error(f"--tokens cannot be used: {error}")
    try:
        if options.oauth_issuer:
            return JwtVerifier(options.oauth_issuer, options.oauth_resource)
    except ValueError as error:
        parser.error(f"--oauth-issuer and --oauth-resource: {error}")
    return None

"""The command line: the top of the package. It imports torch, ray and grpc only in the commands that need them."""

from pager.cli.app import main

__all__ = ["main"]

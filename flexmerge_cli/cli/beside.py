"""Commands in which one option leaves others without effect."""

from typing import Any, ClassVar

from typer.core import TyperCommand


class BesideCommand(TyperCommand):
    """A command that refuses what was typed beside an option with which it has no effect."""

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {}
    """Name of a parameter -> the names of those that have no effect beside it, with spaces between."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        words = {
            parameter.name: parameter.opts[-1] if parameter.param_type_name == "option" else parameter.metavar
            for parameter in self.params
            if getattr(ctx.get_parameter_source(parameter.name), "name", None) == "COMMANDLINE"
        }
        for option, others in self.WITHOUT_EFFECT.items():
            for name in others.split() if option in words else ():
                if name in words:
                    from flexmerge_cli.errors import UsageError

                    raise UsageError(
                        f"{words[name]} has no effect beside {words[option]}",
                        hint=f"leave out {words[name]}, or {words[option]}",
                    )
        return rest

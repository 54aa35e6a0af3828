"""Commands that have an option beside which others have no effect."""

from typing import Any, ClassVar

from typer.core import TyperCommand

WORDS = "flexmerge.words"  # in a context's `meta`: the words of the command


class BesideCommand(TyperCommand):
    """A command that refuses options that have no effect beside another option."""

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {}
    """Maps the name of a parameter to the names of those without effect beside it, separated by spaces."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = [*args]
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

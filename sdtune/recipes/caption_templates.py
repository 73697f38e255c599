"""Captions into which textual inversion puts its new word, so that the word means what they have in common."""

from sdtune.config.methods.textual_inversion import TextualInversionConfig
from sdtune.config.sections import UserError

OBJECT = """
a photo of a {}
a photo of the {}
a picture of one {}
a close photo of a {}
a photo of a {} seen from afar
a bright photo of a {}
a dim photo of the {}
a sharp photo of a {}
a blurred photo of a {}
a small picture of the {}
a large picture of a {}
a cut out picture of a {}
a {} in the middle of the picture
a photo of a clean {}
a photo of an old {}
a photo of my {}
an image of a {}
a drawing of a {}
here is a {}
this is the {}
a {} and nothing else
a {} on a plain background
"""
STYLE = """
a picture in the style of {}
a painting in the style of {}
a drawing in the style of {}
an image made in the style of {}
a small painting in the style of {}
a large painting in the style of {}
a dark painting in the style of {}
a bright painting in the style of {}
a sketch in the style of {}
a print in the style of {}
a detail of a painting in the style of {}
a quick study in the style of {}
a rich picture in the style of {}
a quiet picture in the style of {}
something in the style of {}
a work in the style of {}
"""


def filled(cfg: TextualInversionConfig) -> list[str]:
    """The captions of a run, with its new word in them.

    Raises:
        UserError: the file cannot be read, or a line has no place for the word.
    """
    lines = {"object": OBJECT, "style": STYLE}[cfg.learnable_property].split("\n")
    if cfg.template_file:
        try:
            lines = cfg.template_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template-file {cfg.template_file}: cannot be read ({error})") from None
    lines = [line.strip() for line in lines if line.strip()]
    silent = [line for line in lines if "{}" not in line]
    if silent or not lines:
        what = f"no {{}} in the line {silent[0]!r}" if silent else "no lines in it"
        raise UserError(f"--template-file {cfg.template_file}: {what}; {{}} is where the new word goes")
    return [line.replace("{}", cfg.placeholder_token) for line in lines]

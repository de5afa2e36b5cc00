"""How the gallery shows its examples: their order, and the pictures that their last lines give."""

from pathlib import Path

from sphinx_gallery.scrapers import figure_rst

from adjointbackmap.plots import Drawing

LAST = "___"  # what sphinx-gallery calls the value of a block's last line
SAVED = "___saved"  # the last drawing that was saved: LAST keeps it in blocks without a value

EXAMPLES = (
    "one_unit_over_a_photo",
    "receipt",
    "all_classes",
    "modes_as_sums",
    "your_own_network",
    "network_at_224",
    "time_series",
    "attack",
    "spectra",
    "nearest_kink",
    "line_of_regions",
    "map_of_regions",
    "exact_integrated_gradients",
    "verification",
    "larger_than_memory",
)


class Order:
    """The key that sorts the examples: a file that EXAMPLES lacks stops the build."""

    def __init__(self, folder):
        pass

    def __call__(self, name):
        """Place of a file."""
        return EXAMPLES.index(Path(name).stem)


def save_drawing(block, variables, settings):
    """Save the ``Drawing`` of a block, if its last line gives one, and give its markup."""
    names = variables["example_globals"]
    drawn = names.get(LAST)
    if not isinstance(drawn, Drawing) or drawn is names.get(SAVED):
        return ""
    names[SAVED] = drawn
    path = variables["image_path_iterator"].next()
    Path(path).write_bytes(drawn._repr_png_())
    return figure_rst([path], settings["src_dir"], drawn.caption)

"""Points in three dimensions as Plotly figures, which the reader can turn."""

from typing import Any

from adjointbackmap.report.sections import Scene

SCENE_COLOURS = ("#c8102e", "#222222", "#1f6fb2", "#2e8b57")


def plotly_script() -> str:
    """Plotly's JavaScript. With it the page needs no network."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def scene_figure(scene: Scene) -> dict[str, Any]:
    """A scene as Plotly's data and layout.

    Example:
        >>> scene = Scene({"noise": [[0.0, 1.0, 2.0]]}, {"noise": ["cat"]}, "tSNE", "")
        >>> figure = scene_figure(scene)
        >>> figure["data"][0]["name"], figure["data"][0]["z"]
        ('noise', [2.0])
    """
    data = [
        {
            "type": "scatter3d",
            "mode": "markers+text",
            "name": name,
            **{axis: [point[i] for point in points] for i, axis in enumerate("xyz")},
            "text": scene.labels.get(name, []),
            "textfont": {"size": 10, "color": colour},
            "marker": {"size": 4, "color": colour},
        }
        for (name, points), colour in zip(scene.groups.items(), SCENE_COLOURS, strict=False)
    ]
    axis = {"showticklabels": False, "title": {"text": ""}}
    layout = {
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "height": 420,
        "legend": {"orientation": "h"},
        "scene": {f"{name}axis": axis for name in "xyz"},
        "paper_bgcolor": "white",
    }
    return {"data": data, "layout": layout}

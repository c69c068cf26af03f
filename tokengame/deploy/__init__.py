"""A pruned model for other programs: one graph with the dial as an input, in the formats of inference engines."""

from tokengame.deploy.exporter import FORMATS, export
from tokengame.deploy.graph import GraphOutput, PrunedGraph

__all__ = ["FORMATS", "GraphOutput", "PrunedGraph", "export"]

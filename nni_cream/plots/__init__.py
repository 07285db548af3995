"""Pictures of a run, drawn by matplotlib alone; every picture is a figure, and a pair of files (SVG and PNG)."""

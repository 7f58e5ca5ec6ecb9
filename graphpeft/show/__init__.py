"""Tables and views: text when printed, color on a terminal, HTML in a notebook, plain values for JSON."""

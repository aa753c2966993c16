"""The parts of a graph that a pass uses, for any graph library: sites, views, layouts, kinds."""

"""What a pass sees of a graph, in no graph library: sites, views, layouts, kinds, emitters."""

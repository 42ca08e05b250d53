"""Reference models of interrupt hardware and of the policies that drive it: Arrow tables in, Arrow tables out."""

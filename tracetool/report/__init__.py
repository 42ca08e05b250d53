"""Reports: the same run records as HTML, text, Markdown, JUnit XML and a summary for the terminal."""

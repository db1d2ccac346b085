"""The pages of the site, and what makes two kinds of their content."""

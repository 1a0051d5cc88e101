"""Methods compared at equal cost: variants × seeds, a record that grows, and tables and figures made from it alone."""

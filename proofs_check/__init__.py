"""The paper's lemmas and theorem, checked on the code that trains."""

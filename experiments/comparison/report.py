"""Makes the table, the answer and the figures of a comparison from its rows."""
def write(rows, when, out, console):
    console.print(len(rows), [ (r['setting']['method'], r['loss']) for r in rows][:40])

// A click on a heading sorts its table by that column; another one, backwards.
// What is unknown stays at the end.
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const heading = button.closest('th');
    const body = heading.closest('table').tBodies[0];
    const backwards = heading.getAttribute('aria-sort') === 'ascending';
    const rows = Array.from(body.rows, (row) => {
      const cell = row.cells[heading.cellIndex];
      const text = cell.textContent.trim();
      const number = Number(text.split(' ')[0].replace(/[,%]/g, ''));
      return {row, text, number};
    });
    const unknown = ({text}) => text === '–';
    const compare = (a, b) =>
      Number.isNaN(a.number) || Number.isNaN(b.number)
        ? a.text.localeCompare(b.text, 'en', {numeric: true})
        : a.number - b.number;
    rows.sort(
      (a, b) =>
        unknown(a) - unknown(b) ||
        (unknown(a) ? 0 : backwards ? compare(b, a) : compare(a, b)),
    );
    body.append(...rows.map(({row}) => row));
    for (const other of heading.parentNode.cells) {
      other.removeAttribute('aria-sort');
    }
    heading.setAttribute('aria-sort', backwards ? 'descending' : 'ascending');
  });
}

"use strict";
// Loads the page again when the run has written more; not while someone is looking at a token.
(() => {
  const version = document.body.dataset.version;
  const look = async () => {
    const answer = await fetch("version", { cache: "no-store" }).catch(() => null);
    if (answer === null || !answer.ok) {
      document.title = `(no longer served) ${document.title.replace(/^\(no longer served\) /, "")}`;
      return;
    }
    document.title = document.title.replace(/^\(no longer served\) /, "");
    const isLooking = document.activeElement !== null && document.activeElement.closest("#heatmap") !== null;
    if ((await answer.text()) !== version && !isLooking) location.reload();
  };
  setInterval(look, 3000);
})();

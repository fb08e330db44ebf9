/* A choice of versions, where the site is one of several: `versions.json` lies beside the folder of each version
   (.ci/publish-site writes it). A site that was built on its own has none, and shows no choice. */
(async () => {
    const place = document.querySelector(".versions");
    if (!place || location.protocol === "file:") return;
    const root = new URL(document.documentElement.dataset.content_root, location.href);
    const answer = await fetch(new URL("../versions.json", root)).catch(() => null);
    if (!answer || !answer.ok) return;
    const versions = await answer.json();
    const here = root.pathname.split("/").at(-2);
    if (!versions.includes(here)) return;
    const select = place.querySelector("select");
    for (const version of versions) select.add(new Option(version, version, false, version === here));
    select.addEventListener("change", () => {
        const page = location.pathname.slice(root.pathname.length);
        const there = new URL(`../${select.value}/`, root);
        fetch(new URL(page, there), { method: "HEAD" })
            .then((found) => { location.href = found.ok ? new URL(page, there) : there; });
    });
    place.hidden = false;
})();

/* A choice of versions, where the site is one of several: .ci/publish-site names them all in `versions.json`. A site that was
   built on its own names none, and offers no choice. */
(async () => {
    const place = document.querySelector(".versions");
    if (!place || location.protocol === "file:") return;
    const root = new URL(document.documentElement.dataset.content_root, location.href);
    const versions = await (await fetch(new URL("_static/versions.json", root))).json();
    const here = root.pathname.split("/").at(-2);
    if (!versions.includes(here)) return;
    const select = place.querySelector("select");
    for (const version of versions) select.add(new Option(version, version, false, version === here));
    select.addEventListener("change", async () => {
        const there = new URL(`../${select.value}/`, root);
        const page = new URL(location.pathname.slice(root.pathname.length), there);
        const found = await fetch(page, { method: "HEAD" });  // a page may be newer than that version
        location.href = found.ok ? page : there;
    });
    place.hidden = false;
})();

// The page works without: a block's picture is a link to it. With, a list picks one and the page stays where it is.
const pick = document.getElementById("pick");
if (pick) {
  pick.closest("p").hidden = false;
  pick.addEventListener("change", () => {
    const place = scrollY;
    location.replace("#" + pick.value);
    scrollTo(scrollX, place);
  });
  const follow = () => {
    if (location.hash.startsWith("#block-")) pick.value = location.hash.slice(1);
  };
  addEventListener("hashchange", follow);
  follow();
}

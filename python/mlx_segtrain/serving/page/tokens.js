// A row as it is trained: runs of tokens, each of them trained or only read.
const { h } = Vue;

const token = ([text, weight]) => h("span", [text, weight > 0 && weight !== 1 ? h("sup", `×${weight}`) : null]);

export default {
  props: { runs: Array },
  render() {
    const runs = this.runs.map(([trained, tokens]) => h(trained ? "mark" : "span", tokens.map(token)));
    return h("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Tokens of a row" }, runs);
  },
};

// Opens a page in Chromium, light and dark, and writes down what is really there: boxes, colours, requests, errors.
// node look.mjs FOLDER_OF_PACKAGES PAGE PICTURE_PREFIX
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [packages, file, pictures] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { chromium: playwright } = require("playwright-core");
const bundled = (await import(pathToFileURL(path.join(packages, "node_modules/@sparticuz/chromium/build/esm/index.js")))).default;

const browser = await playwright.launch({
  executablePath: await bundled.executablePath(),
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"],
});
const seen = { requests: [], errors: [] };
for (const scheme of ["light", "dark"]) {
  const page = await browser.newPage({ colorScheme: scheme, viewport: { width: 1280, height: 900 } });
  page.on("request", (request) => seen.requests.push(request.url()));
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  await page.goto(pathToFileURL(path.resolve(file)).href);
  seen[scheme] = await page.evaluate(() => {
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    const box = (element) => {
      const { width, height, left, right } = element.getBoundingClientRect();
      return { width, height, left, right };
    };
    const own = document.querySelector(".diffopt");
    const rows = [...own.querySelectorAll("table.recipes tbody tr")].map((row) => [...row.children].map((cell) => cell.innerText));
    const bars = [...own.querySelectorAll("svg.bars rect.bar")].map((bar) => ({ kind: bar.getAttribute("class"), ...box(bar) }));
    const pictures = [...own.querySelectorAll("svg")].map((svg) => ({ title: svg.querySelector("title")?.textContent, ...box(svg) }));
    return {
      rows,
      bars,
      pictures,
      headings: [...own.querySelectorAll("table.recipes thead th")].map((cell) => cell.innerText),
      gate: own.querySelector(".gate").innerText,
      widest: document.documentElement.scrollWidth,
      text: getComputedStyle(own).color,
      back: getComputedStyle(own).backgroundColor,
    };
  });
  await page.screenshot({ path: `${pictures}-${scheme}.png`, fullPage: true });
  await page.close();
}
await browser.close();
console.log(JSON.stringify(seen));
